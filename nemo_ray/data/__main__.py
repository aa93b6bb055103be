"""`python -m nemo_ray.data CONFIG [key=value ...]`: prepare it all, or show examples (`--show N`)."""

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from nemo_ray import hub
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.data.charts import number
from nemo_ray.data.examples import Probe, probe_sources
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.page import data_page
from nemo_ray.data.page_facts import PAGE_EXAMPLES, page_facts
from nemo_ray.data.preparing import INTERRUPTED, Interrupts, prepare_missing, stopped_line
from nemo_ray.data.show import show_probes
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics, describe
from nemo_ray.errors import DataError, NemoRayError, tell
from nemo_ray.storage import publish_bytes
from nemo_ray.stored_run import open_run, prepared_place


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 for a wrong configuration, 1 for unusable data."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_ray.data",
        description="Prepare a configuration's data, and write a page about it: OUTPUT_DIR/data.html.",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument(
        "--show", type=_whole, metavar="N", help="print N examples of each dataset, and prepare nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False)
    plan: DataPlan | None = None
    with Interrupts() as interrupts:
        try:
            loaded = load_config(options.config, options.overrides)
            for notice in loaded.notices:
                _say(f"note: {notice}", console)
            config = hub.pin(loaded.config, weights=False, here=False)
            plan = plan_data(config.data, hub.reference(config), prepared_directory(config))
            for notice in plan.notices:
                _say(f"note: {notice}", console)
            if options.show is not None:
                probes = probe_sources(plan, config.data, hub.reference(config), options.show)
                show_probes(plan, probes, console)
                _write_page(plan, config, probes, console)
            else:
                _prepare(plan, config, console, interrupts)
        except NemoRayError as error:
            return tell(error)
        except KeyboardInterrupt:
            _say("stopped" if plan is None else stopped_line(plan), console)
            return INTERRUPTED
    return 0


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 0 or more")
    return int(text)


def prepared_directory(config: Config) -> str:
    """Where the configuration's shards are kept."""
    if config.dataset_prepared_path is not None:
        return config.dataset_prepared_path
    return prepared_place(config.output_dir)


def _say(line: str, console: Console) -> None:
    console.print(Text(line), soft_wrap=True)


def _prepare(plan: DataPlan, config: Config, console: Console, interrupts: Interrupts) -> None:
    windows = f"{len(plan.windows) + len(plan.eval_windows):,} windows"
    _say(f"{windows} -> {plan.directory}", console)
    started = time.monotonic()
    made = prepare_missing(plan, config, console, interrupts)
    elapsed_s = time.monotonic() - started
    for line in describe(data_statistics(plan)):
        _say(line, console)
    run = open_run(config.output_dir)
    if run.rejected_file.exists():
        run.keep(run.rejected_file)
        _say(f"rejected rows are listed in {run.shown(run.rejected_file)}", console)
    _say(f"shards: {plan.directory}", console)
    if made is None:
        _say(f"all {windows} were prepared already", console)
    else:
        speed = f"{number(made.new_rows)} rows, {number(made.new_tokens / elapsed_s)} tokens/s"
        _say(f"prepared in {elapsed_s:.1f} s, Ray's start included: {speed}", console)
    probes = probe_sources(plan, config.data, hub.reference(config), PAGE_EXAMPLES)
    _write_page(plan, config, probes, console)


def _write_page(plan: DataPlan, config: Config, probes: Sequence[Probe], console: Console) -> None:
    run = open_run(config.output_dir)
    page = run.shown(run.data_page)
    try:
        publish_bytes(page, data_page(page_facts(plan, config, probes)).encode())
    except OSError as error:
        raise DataError(f"output_dir: {page} cannot be written: {error.strerror or error}") from None
    _say(f"page: {page}", console)


if __name__ == "__main__":
    sys.exit(main())
