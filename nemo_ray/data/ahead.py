"""All of a configuration's data, prepared ahead of a run, and the page about it."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from nemo_ray import hub
from nemo_ray.config.load import LoadedConfig
from nemo_ray.config.schema import Config
from nemo_ray.data.charts import number
from nemo_ray.data.examples import Probe, probe_sources
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.page import data_page
from nemo_ray.data.page_facts import PAGE_EXAMPLES, page_facts
from nemo_ray.data.preparing import Interrupts, prepare_missing
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics, describe
from nemo_ray.errors import DataError
from nemo_ray.storage import publish_bytes
from nemo_ray.stored_run import open_run, prepared_place


def say(line: str, console: Console) -> None:
    """One line to the user."""
    console.print(Text(line), soft_wrap=True)


def plan_ahead(loaded: LoadedConfig, console: Console) -> tuple[DataPlan, Config]:
    """What is there to prepare, and the configuration with the commits of what it names on the hub."""
    for notice in loaded.notices:
        say(f"note: {notice}", console)
    config = hub.pin(loaded.config, weights=False, here=False)
    plan = plan_data(config.data, hub.reference(config), prepared_directory(config))
    for notice in plan.notices:
        say(f"note: {notice}", console)
    return plan, config


def prepared_directory(config: Config) -> str:
    """Where the configuration's shards are kept."""
    if config.dataset_prepared_path is not None:
        return config.dataset_prepared_path
    return prepared_place(config.output_dir)


def prepare_ahead(
    plan: DataPlan, config: Config, console: Console, interrupts: Interrupts, verbose: bool = False
) -> None:
    """Make the shards that are missing, and say what all of them hold."""
    windows = f"{len(plan.windows) + len(plan.eval_windows):,} windows"
    say(f"{windows} -> {plan.directory}", console)
    started = time.monotonic()
    made = prepare_missing(plan, config, console, interrupts, verbose)
    elapsed_s = time.monotonic() - started
    for line in describe(data_statistics(plan)):
        say(line, console)
    run = open_run(config.output_dir)
    if run.rejected_file.exists():
        run.keep(run.rejected_file)
        say(f"rejected rows are listed in {run.shown(run.rejected_file)}", console)
    say(f"shards: {plan.directory}", console)
    if made is None:
        say(f"all {windows} were prepared already", console)
    else:
        speed = f"{number(made.new_rows)} rows, {number(made.new_tokens / elapsed_s)} tokens/s"
        say(f"prepared in {elapsed_s:.1f} s, Ray's start included: {speed}", console)
    probes = probe_sources(plan, config.data, hub.reference(config), PAGE_EXAMPLES)
    write_page(plan, config, probes, console)


def write_page(plan: DataPlan, config: Config, probes: Sequence[Probe], console: Console) -> None:
    """OUTPUT_DIR/data.html. Raises: DataError where it cannot be written."""
    run = open_run(config.output_dir)
    page = run.shown(run.data_page)
    try:
        publish_bytes(page, data_page(page_facts(plan, config, probes)).encode())
    except OSError as error:
        raise DataError(f"output_dir: {page} cannot be written: {error.strerror or error}") from None
    say(f"page: {page}", console)
