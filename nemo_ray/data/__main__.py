"""`python -m nemo_ray.data CONFIG [key=value ...]`: prepare it all, or show examples (`--show N`)."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from nemo_ray import hub
from nemo_ray.config.command_line import CommandParser
from nemo_ray.config.load import load_config
from nemo_ray.data.ahead import plan_ahead, prepare_ahead, say, write_page
from nemo_ray.data.examples import probe_sources
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.preparing import INTERRUPTED, Interrupts, stopped_line
from nemo_ray.data.show import show_probes
from nemo_ray.errors import NemoRayError, tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 for a wrong configuration, 1 for unusable data."""
    parser = CommandParser(
        prog="python -m nemo_ray.data",
        description="Prepare a configuration's data, and write a page about it: OUTPUT_DIR/data.html.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="YAML file, or - for standard input")
    parser.add_overrides("settings that win over the file's")
    parser.add_argument(
        "--show", type=_whole, metavar="N", help="print N examples of each dataset, and prepare nothing"
    )
    parser.add_argument("--verbose", action="store_true", help="print what Ray logs")
    options = parser.parse(arguments)
    console = Console(highlight=False)
    plan: DataPlan | None = None
    with Interrupts() as interrupts:
        try:
            loaded = load_config(options.config, options.overrides)
            plan, config = plan_ahead(loaded, console)
            if options.show is not None:
                probes = probe_sources(plan, config.data, hub.reference(config), options.show)
                show_probes(plan, probes, console)
                write_page(plan, config, probes, console)
            else:
                prepare_ahead(plan, config, console, interrupts, options.verbose)
        except NemoRayError as error:
            return tell(error)
        except KeyboardInterrupt:
            say("stopped" if plan is None else stopped_line(plan), console)
            return INTERRUPTED
    return 0


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 0 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
