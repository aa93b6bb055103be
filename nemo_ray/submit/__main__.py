"""`nemo-ray submit CONFIG.yaml [key=value ...]`: train, or sweep, as a job of a Ray cluster."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ray.config.command_line import CommandParser
from nemo_ray.config.schema import Config
from nemo_ray.config.yaml_file import STANDARD_INPUT
from nemo_ray.errors import ConfigError, NemoRayError, tell

if TYPE_CHECKING:
    from nemo_ray.submit.job import Jobs

EPILOG = """\
examples:
  nemo-ray submit run.yaml --address http://head:8265 --id my-run --env HF_TOKEN
  nemo-ray submit run.yaml learning_rate=1e-4 --detach
  nemo-ray submit sweep.yaml                           # with a tune: section, a sweep

The package, the file and what it names by relative paths travel with the job, nothing else. With --id, the
same command again follows the job while it runs, and goes on from its newest checkpoint once it has ended.

exit codes: those of the job's command; 0 with --detach once it is taken, 2 the configuration is wrong,
130 the job was stopped, or following it was (the job goes on)
"""


def parser() -> CommandParser:
    """The command line."""
    result = CommandParser(
        prog="nemo-ray submit",
        description="Run a configuration on a Ray cluster, and follow it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("config", metavar="CONFIG.yaml", help="the configuration of a run, or of a sweep")
    result.add_overrides()
    result.add_argument("--address", metavar="URL", help="the cluster's dashboard, as http://HOST:8265")
    result.add_argument("--id", metavar="NAME", help="the job's name, to follow it or go on with it later")
    result.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        default=[],
        help="pass on this environment variable; again for more",
    )
    result.add_argument("--detach", action="store_true", help="leave once the job is taken")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse(arguments)
    try:
        return submit(given, os.environ)
    except NemoRayError as error:
        return tell(error)


def submit(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Hand the job in, or find the one that runs, and follow it. Raises ConfigError, ClusterError."""
    from nemo_ray.submit.bundle import bundle
    from nemo_ray.submit.job import Jobs, check_name, next_id

    if given.config == STANDARD_INPUT:
        raise ConfigError("CONFIG.yaml: - is standard input, which cannot travel with a job; give a file")
    if given.id is not None:
        check_name(given.id)
    variables = _named(given.env, environ)
    module, config = load(given.config, given.overrides)
    with tempfile.TemporaryDirectory(prefix="nemo-ray-job-") as name:
        folder = Path(name) / "job"
        file = bundle(Path(given.config), config, Path.cwd(), folder)
        jobs = Jobs(given.address)
        newest = jobs.newest(given.id) if given.id is not None else None
        if newest is not None and not newest.ended:
            print(f"job {newest.id} is {newest.status.lower()}: nothing new was handed in", flush=True)
            return _follow(jobs, newest.id, given)
        again: list[str] = []
        if newest is not None and not newest.was_refused:
            again = ["--resume"] if module == "tune" else ["resume_from_checkpoint=auto"]
        words = ["python", "-m", f"nemo_ray.{module}", file, *given.overrides, *again]
        for notice in stays_here(config, variables, environ):
            print(f"note: {notice}", flush=True)
        submission_id = next_id(given.id, newest) if given.id is not None else None
        job = jobs.submit(shlex.join(words), folder, variables, submission_id)
    passed = f", with {', '.join(variables)}" if variables else ""
    goes_on = f", going on from {newest.id}" if newest is not None and again else ""
    print(f"job {job}: {shlex.join(words)}{passed}{goes_on}", flush=True)
    return _follow(jobs, job, given)


def load(path: str, overrides: Sequence[str]) -> tuple[str, Config]:
    """("train" or "tune", the configuration), checked but for paths, which are the cluster's. Raises
    ConfigError."""
    from nemo_ray.config.load import check_raw, load_config, read_raw

    raw = read_raw(path, overrides)
    if raw.get("tune"):
        from nemo_ray.tune.load import load_sweep

        load_sweep(path, overrides, check_paths=False)
        raw.pop("tune")
        return "tune", check_raw(raw, check_paths=False).config
    return "train", load_config(path, overrides, check_paths=False).config


def stays_here(config: Config, passed: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """A line for variables that the run would use, that are set here and are not passed on."""
    from nemo_ray import hub, urls
    from nemo_ray.config.checks import store_urls
    from nemo_ray.train.trackers.setup import variables_to_pass_on

    used = {
        **hub.variables_to_pass_on(config, environ),
        **urls.variables_to_pass_on(store_urls(config), environ),
        **variables_to_pass_on(config.tracking, environ),
    }
    left = sorted(set(used) - set(passed))
    if not left:
        return []
    options = " ".join(f"--env {name}" for name in left)
    return [f"{', '.join(left)}: set here, and not passed on; {options} does, if the cluster has none"]


def _named(names: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    for name in names:
        if name not in environ:
            given = "give its name alone: its value is taken from here" if "=" in name else "set it first"
            raise ConfigError(f"--env: {name.partition('=')[0]} is not set here; {given}")
    return {name: environ[name] for name in names}


def _follow(jobs: "Jobs", job: str, given: argparse.Namespace) -> int:
    if given.detach:
        address = f" --address={given.address}" if given.address else ""
        print(f"its log: ray job logs{address} --follow {job}")
        return 0
    try:
        code = jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; `ray job stop {job}` ends it")
        return 130
    print(f"job {job} ended with {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
