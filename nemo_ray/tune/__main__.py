"""`python -m nemo_ray.tune CONFIG.yaml [key=value ...]`: a sweep of the training job."""

import argparse
import sys
from collections.abc import Sequence

from nemo_ray.errors import NemoRayError, tell

EPILOG = """\
examples:
  python -m nemo_ray.tune configs/sweep-quickstart.yaml
  python -m nemo_ray.tune sweep.yaml tune.num_trials=20 ray.num_workers=4
  python -m nemo_ray.tune sweep.yaml --resume
  ray job submit --working-dir . -- python -m nemo_ray.tune sweep.yaml

exit codes: 0 done, 1 no trial came to its end, 2 the configuration is wrong (nothing was started),
130 stopped by Ctrl-C or SIGTERM (the trials save a checkpoint first; a second signal stops at once)
"""


def parser() -> argparse.ArgumentParser:
    """The command line of a sweep."""
    result = argparse.ArgumentParser(
        prog="python -m nemo_ray.tune",
        description="Train many times with other settings, on Ray, and keep the best.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("config", metavar="CONFIG.yaml", help="the configuration, with a tune section")
    result.add_argument(
        "overrides", metavar="key=value", nargs="*", help="replaces a key of the file, as in training"
    )
    result.add_argument("--resume", action="store_true", help="continue the sweep in output_dir")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code. A sweep that is refused is refused before torch or Ray are loaded."""
    given = parser().parse_intermixed_args(arguments)
    try:
        from nemo_ray.tune.load import load_sweep

        sweep = load_sweep(given.config, given.overrides)
        from nemo_ray.tune.launch import run

        return run(sweep, given.resume)
    except NemoRayError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
