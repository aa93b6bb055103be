"""`python -m nemo_ray.data CONFIG [key=value ...]`: prepare it all, or show examples (`--show N`)."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nemo_ray import hub, session, urls
from nemo_ray.config.checks import data_urls
from nemo_ray.config.load import load_config
from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.order import window_order
from nemo_ray.data.show import show_examples
from nemo_ray.data.sources import plan_data
from nemo_ray.data.statistics import data_statistics, describe
from nemo_ray.errors import NemoRayError, tell
from nemo_ray.run_dir import RunDir


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 for a wrong configuration, 1 for unusable data."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_ray.data", description="Prepare a configuration's data."
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument(
        "--show", type=int, metavar="N", help="print N examples of each dataset, and prepare nothing"
    )
    options = parser.parse_args(arguments)
    try:
        loaded = load_config(options.config, options.overrides)
        for notice in loaded.notices:
            print(f"note: {notice}")
        config = hub.pin(loaded.config, weights=False, here=False)
        model = hub.reference(config)
        plan = plan_data(config.data, model, prepared_directory(config))
        for notice in plan.notices:
            print(f"note: {notice}")
        if options.show is not None:
            show_examples(plan, config.data, model, options.show, Console(highlight=False))
        else:
            _prepare(plan, config)
    except NemoRayError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130
    return 0


def prepared_directory(config: Config) -> str:
    """Where the configuration's shards are kept."""
    if config.dataset_prepared_path is not None:
        return config.dataset_prepared_path
    return str(RunDir(Path(config.output_dir)).prepared_dir)


def _prepare(plan: DataPlan, config: Config) -> None:
    print(f"{len(plan.windows) + len(plan.eval_windows)} windows -> {plan.directory}", flush=True)
    started = time.monotonic()
    environment = session.Environment()
    address = session.address_to_join(config.ray, os.environ)
    if address is None:
        session.start_local(os.cpu_count() or 1, environment)
    else:
        stores = urls.variables_to_pass_on(data_urls(config), os.environ)
        hubs = hub.variables_to_pass_on(config, os.environ)
        session.connect(address, environment, {**hubs, **stores})
    from nemo_ray.data.pipeline import check_shared, prepare  # imports Ray, which reads its environment then

    try:
        check_shared({"dataset_prepared_path": plan.directory})
        prepare(
            plan,
            config.data,
            hub.reference(config),
            order=window_order(plan, config.seed),
            progress=_print_progress,
        )
    finally:
        session.shutdown()
        environment.restore()
    for line in describe(data_statistics(plan)):
        print(line)
    print(f"prepared in {time.monotonic() - started:.1f} s, Ray's start included")


def _print_progress(ready: int, windows: int) -> None:
    """About ten lines, whatever the number of windows."""
    if ready == windows or ready % max(windows // 10, 1) == 0:
        print(f"{ready}/{windows} windows", flush=True)


if __name__ == "__main__":
    sys.exit(main())
