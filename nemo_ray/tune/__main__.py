"""`python -m nemo_ray.tune CONFIG.yaml [key=value ...]`: a sweep of the training job; and `merge DIR ...`."""

import argparse
import sys
from collections.abc import Sequence

from nemo_ray.config.command_line import CommandParser
from nemo_ray.errors import NemoRayError, tell

EPILOG = """\
examples:
  python -m nemo_ray.tune configs/sweep-quickstart.yaml
  python -m nemo_ray.tune sweep.yaml tune.num_trials=20 ray.num_workers=4
  python -m nemo_ray.tune sweep.yaml --resume
  python -m nemo_ray.tune sweep.yaml --shard 1/2      (--shard 2/2 on another cluster; see docs/sweeps.md)
  python -m nemo_ray.tune merge DIR ...               (join the parts; merge --help says more)
  ray job submit --working-dir . -- python -m nemo_ray.tune sweep.yaml

exit codes: 0 done, 1 no trial came to its end, 2 the configuration is wrong (nothing was started),
130 stopped by Ctrl-C or SIGTERM (the trials save a checkpoint first; a second signal stops at once)
"""


def parser() -> CommandParser:
    """The command line of a sweep."""
    result = CommandParser(
        prog="python -m nemo_ray.tune",
        description="Train many times with other settings, on Ray, and keep the best.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "config", metavar="CONFIG.yaml", help="the configuration, with a tune section; - reads standard input"
    )
    result.add_overrides("replaces a key of the file, as in training")
    result.add_argument("--resume", action="store_true", help="continue the sweep in output_dir")
    result.add_argument(
        "--shard",
        metavar="i/n",
        default="1/1",
        help="only the i-th of n parts of the trials, for one cluster",
    )
    result.add_argument(
        "--verbose", action="store_true", help="print what Ray and the workers log, with rank and step"
    )
    return result


def merge_parser() -> CommandParser:
    """The command line that joins the parts of a sweep."""
    result = CommandParser(
        prog="python -m nemo_ray.tune merge",
        description="Join the parts of a sweep that was split over clusters: one report, one best.",
    )
    result.add_argument("parts", metavar="DIR", nargs="+", help="output_dir of a part, a folder or a URL")
    result.add_argument(
        "--output", metavar="DIR", default="outputs/merged", help="the whole, a new folder (%(default)s)"
    )
    return result


def _merge(arguments: Sequence[str]) -> int:
    given = merge_parser().parse(arguments)
    from nemo_ray.tune.merge import merge
    from nemo_ray.tune.words import print_merged

    print_merged(merge(given.parts, given.output))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code. A sweep that is refused is refused before torch or Ray are loaded."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["merge"]:
            return _merge(words[1:])
        given = parser().parse(words)
        from nemo_ray.tune.load import load_sweep
        from nemo_ray.tune.shards import parse_shard

        sweep = load_sweep(given.config, given.overrides)
        shard = parse_shard(given.shard, sweep)
        from nemo_ray.tune.launch import run

        return run(sweep, given.resume, shard, given.verbose)
    except NemoRayError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
