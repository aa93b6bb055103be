"""`nemo-ray doctor [CONFIG.yaml] [key=value ...]`: what would be in a run's way here, or on a cluster."""

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from nemo_ray.config.command_line import CommandParser
from nemo_ray.config.schema import Config, RaySection
from nemo_ray.doctor.findings import ERROR, OK, WARNING, Finding, from_line, ok, worst
from nemo_ray.errors import ClusterError, NemoRayError, tell
from nemo_ray.visible import visible

EPILOG = """\
examples:
  nemo-ray doctor                              # this machine
  nemo-ray doctor run.yaml                     # and what a run's configuration names
  nemo-ray doctor run.yaml --address auto      # and every node of a cluster, from one of its nodes

exit codes: 0 all is well, 1 there are errors, 2 the configuration is wrong, 3 there are warnings only
"""
EXIT_CODES = {OK: 0, ERROR: 1, WARNING: 3}
SUBJECT_WIDTH = 15
Section = tuple[str, list[Finding]]


def parser() -> CommandParser:
    """The command line."""
    result = CommandParser(
        prog="nemo-ray doctor",
        description="Look at this machine, at what a configuration names, and at the nodes of a cluster: "
        "a line each, with the remedy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?", help="the configuration of a run; - reads standard input"
    )
    result.add_overrides()
    result.add_argument(
        "--address",
        metavar="ADDRESS",
        help="a cluster, as HOST:PORT or auto (default: ray.address, then RAY_ADDRESS, then none)",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object instead")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse(arguments)
    found: dict[str, list[Finding]] = {}
    try:
        for place, findings in examine(given, os.environ):
            if not given.json:
                heading = [] if place in found else [*([""] if found else []), place]
                print("\n".join([*heading, *words(findings)]), flush=True)
            found.setdefault(place, []).extend(findings)
    except NemoRayError as refused:
        return tell(refused)
    if given.json:
        print(json.dumps({place: [asdict(one) for one in lines] for place, lines in found.items()}, indent=2))
    return EXIT_CODES[worst(one for findings in found.values() for one in findings)]


def examine(given: argparse.Namespace, environ: Mapping[str, str]) -> Iterator[Section]:
    """Place by place, each in one part or more. Raises: ConfigError"""
    from nemo_ray.doctor import inputs, machine
    from nemo_ray.session import address_to_join
    from nemo_ray.train.resources import cpus_here, gpus_here

    config = load(given.config, given.overrides) if given.config is not None else None
    folders = inputs.folders_of(config) if config else {}
    section = config.ray if config else RaySection()
    address = given.address or address_to_join(section, environ)
    on_disk = {key: folder for key, folder in folders.items() if "://" not in folder}
    here = f"this machine, {socket.gethostname()}"
    for finding in machine.examine({} if address else on_disk, computes=not address):
        yield here, [finding]
    if not address:
        own = {"CPU": float(cpus_here()), "GPU": float(gpus_here(environ))}
        yield here, [*between_processes(), *judge_demand(config, [own], connected=False)]
    if config is not None:
        yield "the configuration", inputs.examine(config, environ)
    if address:
        yield from on_cluster(address, folders, config)


def load(path: str, overrides: Sequence[str]) -> Config:
    """The configuration with the places where a run would write; its inputs are looked at later. Raises
    ConfigError."""
    from nemo_ray.config.load import load_config
    from nemo_ray.train.outputs import resolve_paths, submission_id

    config = load_config(path, overrides, check_paths=False).config
    return resolve_paths(config, submission_id(os.environ) is not None, Path.cwd())


def between_processes() -> list[Finding]:
    """Whether two workers of this machine would find each other: by its own name, as torch's gloo does."""
    from concurrent.futures import ThreadPoolExecutor

    from nemo_ray.doctor import network

    with network.listen("127.0.0.1") as place:
        port = int(place.getsockname()[1])
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(network.sum_over_group, "gloo", rank, 2, "127.0.0.1", port) for rank in (0, 1)]
        return [network.judge_sum("gloo", [one.result() for one in asked], "2 processes here")]


def on_cluster(address: str, folders: Mapping[str, str], config: Config | None) -> Iterator[Section]:
    """Its nodes, and what lies between them; what cannot be joined is one line."""
    from nemo_ray import hub, session, urls
    from nemo_ray.config.checks import store_urls

    variables = {}
    if config is not None:
        variables = urls.variables_to_pass_on(store_urls(config), os.environ)
        variables |= hub.variables_to_pass_on(config, os.environ)
    environment = session.Environment()
    try:
        session.connect(address, environment, variables)
    except ClusterError as refused:
        yield f"the cluster at {address}", [from_line("connection", str(refused))]
        return
    try:
        from nemo_ray.doctor import cluster

        found = cluster.examine(folders)
        whole = found.pop("cluster")
        yield from found.items()
        yield f"the cluster at {address}", [*judge_demand(config, session.nodes(), connected=True), *whole]
    finally:
        session.shutdown()
        environment.restore()


def judge_demand(
    config: Config | None, nodes: Sequence[Mapping[str, float]], connected: bool
) -> list[Finding]:
    """Whether nodes of these resources have room for the workers that the run asks for."""
    from nemo_ray.train.resources import demand, place, require_num_workers

    if config is None:
        return []
    try:
        require_num_workers(config.ray, connected)
        wanted = demand(config, sum(node.get("GPU", 0.0) for node in nodes))
        if connected or wanted.use_gpu:  # a Ray of our own is given the CPUs that it needs
            place(wanted, nodes, config.ray.accelerator_type)
    except NemoRayError as refused:
        return [from_line("workers", str(refused))]
    each = " + ".join(f"{amount:g} {name}" for name, amount in wanted.per_worker.items())
    return [ok("workers", f"{wanted.num_workers} with {each} each have room")]


def words(findings: Sequence[Finding]) -> list[str]:
    """Lines of a place as the terminal shows them."""
    lines = []
    for one in findings:
        lines.append(visible(f"  {one.state:<8} {one.subject:<{SUBJECT_WIDTH}}  {one.says}"))
        if one.remedy:
            lines.append(visible(f"  {'':<8} {'':<{SUBJECT_WIDTH}}  -> {one.remedy}"))
    return lines


if __name__ == "__main__":
    sys.exit(main())
