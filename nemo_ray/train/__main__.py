"""`python -m nemo_ray.train CONFIG.yaml [key=value ...]`: train as the file says."""

import argparse
import sys
from collections.abc import Sequence

from nemo_ray.config.command_line import CommandParser
from nemo_ray.errors import NemoRayError, tell

EPILOG = """\
examples:
  python -m nemo_ray.train configs/quickstart.yaml
  python -m nemo_ray.train run.yaml learning_rate=1e-4 lora_r=32 ray.num_workers=4
  python -m nemo_ray.train run.yaml resume_from_checkpoint=auto
  ray job submit --working-dir . -- python -m nemo_ray.train run.yaml

exit codes: 0 done, 1 the run failed, 2 the configuration is wrong (nothing was started),
130 stopped by Ctrl-C or SIGTERM (a checkpoint is saved first; a second signal stops at once)
"""


def parser() -> CommandParser:
    """The command line of training."""
    result = CommandParser(
        prog="python -m nemo_ray.train",
        description="Fine-tune a Nemotron-H model on Ray. The keys are listed in docs/config.md.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "config", metavar="CONFIG.yaml", help="the run's configuration; - reads standard input"
    )
    result.add_overrides(
        "replaces a key of the file; ray.key=value for one of the ray section, key= to remove it"
    )
    result.add_argument(
        "--force",
        action="store_true",
        help="train although no GPU of the cluster can hold it, by the estimate",
    )
    result.add_argument(
        "--verbose", action="store_true", help="print what Ray and the workers log, with rank and step"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code. A configuration that is refused is refused before torch or Ray are loaded."""
    given = parser().parse(arguments)
    try:
        from nemo_ray.config.load import load_config

        loaded = load_config(given.config, given.overrides)
        from nemo_ray.train.launch import run

        return run(loaded, given.force, given.verbose)
    except NemoRayError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
