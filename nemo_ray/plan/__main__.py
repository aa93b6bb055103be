"""`nemo-ray plan CONFIG.yaml`: what a run takes of which GPUs, before one is paid for."""

import argparse
import json
import sys
from collections.abc import Sequence

from nemo_ray.config.command_line import CommandParser
from nemo_ray.errors import NemoRayError, tell
from nemo_ray.plan.gpus import GPUS

EPILOG = """\
examples:
  nemo-ray plan run.yaml --gpu h100 --num-gpus 8 --price 2.5
  nemo-ray plan run.yaml sequence_len=16384 --json

No GPU, weights or network are needed: config.json is enough, and those of the published models are known.
exit codes: 0 it fits, 1 it does not, 2 the configuration is wrong
"""


def parser() -> CommandParser:
    """The command line."""
    result = CommandParser(
        prog="nemo-ray plan",
        description="Say what a run takes: parameters, memory of a GPU by class, speed, time and cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "config", metavar="CONFIG.yaml", help="the run's configuration; - reads standard input"
    )
    result.add_overrides()
    result.add_argument("--gpu", metavar="NAME", default="h100", help=f"{', '.join(GPUS)} (%(default)s)")
    result.add_argument("--num-gpus", metavar="N", type=int, help="default: ray.num_workers, else 1")
    result.add_argument("--price", metavar="PRICE", type=float, help="of a GPU hour, in any currency")
    result.add_argument("--json", action="store_true", help="print one JSON object instead")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse(arguments)
    try:
        from nemo_ray.config.load import load_config
        from nemo_ray.plan.facts import plan_facts

        config = load_config(given.config, given.overrides, check_paths=False).config
        found = plan_facts(config, given.gpu, given.num_gpus, given.price)
    except NemoRayError as error:
        return tell(error)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        from nemo_ray.plan.words import lines

        print("\n".join(lines(found)))
    return 0 if found["memory"]["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
