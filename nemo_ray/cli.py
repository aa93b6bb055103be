"""`nemo-ray COMMAND ...`: each command is `python -m` of one module, under a shorter name."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from nemo_ray import __version__


class Command(NamedTuple):
    """A row of the table below; the module has `main(arguments) -> exit code`."""

    module: str
    help: str


COMMANDS = {
    "train": Command("nemo_ray.train.__main__", "fine-tune as a YAML file says"),
    "tune": Command("nemo_ray.tune.__main__", "train many times with other settings, and keep the best"),
    "submit": Command("nemo_ray.submit.__main__", "train or sweep as a job of a Ray cluster"),
    "plan": Command("nemo_ray.plan.__main__", "say what a run takes, before a GPU is paid for"),
    "doctor": Command(
        "nemo_ray.doctor.__main__", "look for what would be in a run's way, here or on a cluster"
    ),
    "prepare": Command("nemo_ray.data.__main__", "tokenize and pack a run's data before it is needed"),
    "status": Command("nemo_ray.view.status", "show the state of a run or a sweep"),
    "report": Command("nemo_ray.view.report", "write a page of curves, speed, data and events"),
    "export": Command("nemo_ray.export.__main__", "merge an adapter, or check it in plain libraries"),
    "generate": Command("nemo_ray.model.generate", "answer a prompt with a model and an adapter"),
}


def usage() -> str:
    """The text of `nemo-ray --help`."""
    width = max(len(name) for name in COMMANDS) + 2
    rows = "\n".join(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items())
    return (
        "usage: nemo-ray COMMAND [argument ...]\n\n"
        f"Fine-tune NVIDIA Nemotron-H models on a Ray cluster.\n\ncommands:\n{rows}\n\n"
        "`nemo-ray COMMAND --help` says more; `nemo-ray --version` prints the version."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command; 2 for one that there is not."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        print(f"nemo-ray {__version__}")
        return 0
    command = COMMANDS.get(given[0])
    if command is None:
        print(f"error: nemo-ray has no command {given[0]}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    run: Callable[[Sequence[str]], int] = import_module(command.module).main
    return run(given[1:])


if __name__ == "__main__":
    sys.exit(main())
