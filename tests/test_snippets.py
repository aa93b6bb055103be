"""The commands and programs that the pages show: each one runs here, or a table below says why it cannot.

Owns that nothing is left out and that nothing fails; what the commands do is what all other tests are about.
The one liberty taken is that trainings are made short.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest

from nemo_ray.cli import COMMANDS
from tests.e2e.command import ROOT, Command

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("SECURITY.md"),
    ROOT / "docs" / "index.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"),
]

# -- what is not run, and why ---------------------------------------------------------------------

NOT_RUN = {
    "installs packages": (
        "python3 -m venv .venv",
        ". .venv/bin/activate",
        "pip install -c constraints.txt -e .",
        "pip install setuptools wheel ninja packaging",
        "pip install --no-build-isolation -c constraints.txt -e '.[cuda]'",
        "pip install 'nemo-ray[wandb]'",
        "pip install 'nemo-ray[mlflow]'",
        "make install",
    ),
    "is what the checks run": (
        "make lint",
        "make unit",
        "make test",
        "make test-long",
        "make docs",
        ".venv/bin/python -m pytest tests/data/test_packing.py -k full",
    ),
    "needs a cluster": (
        "ray start --head",
        "ray job submit --working-dir . -- python -m nemo_ray.train configs/quickstart.yaml",
        "nemo-ray submit configs/quickstart.yaml --address http://HOST:8265 --id my-run --env HF_TOKEN",
        "nemo-ray submit run.yaml --address http://127.0.0.1:8265 --id my-run",
        "nemo-ray doctor run.yaml --address auto",
        "ray up -y cluster/aws-h100.yaml",
        "ray dashboard cluster/aws-h100.yaml",
        "ray down -y cluster/aws-h100.yaml",
        "ray job submit --address=http://HEAD_A:8265 --working-dir=. -- "
        "python -m nemo_ray.tune sweep.yaml --shard=1/2 output_dir=/shared-a/sweep ray.num_workers=8",
        "ray job submit --address=http://HEAD_B:8265 --working-dir=. -- "
        "python -m nemo_ray.tune sweep.yaml --shard=2/2 output_dir=/shared-b/sweep ray.num_workers=8",
    ),
    "takes minutes; tests/e2e/test_sweep.py has shorter ones": (
        "python -m nemo_ray.tune configs/sweep-quickstart.yaml",
    ),
    "needs parts of a sweep, from two clusters; tests/tune/test_sweep_parts.py": (
        "python -m nemo_ray.tune sweep.yaml --shard=1/2",
        "python -m nemo_ray.tune merge results/a s3://bucket/b --output outputs/sweep",
    ),
    "needs a GPU": (
        "python benchmarks/train_step.py --model nano --tokens 8192 --adapter lora --compare peft "
        "--out step.json",
        "python -m nemo_ray.train configs/nemotron-3-nano-30b-a3b-lora.yaml",
        "python -m nemo_ray.train configs/nemotron-3-super-120b-a12b-qlora.yaml",
        "python -m nemo_ray.train nano-30b-a3b-qlora.yaml",
        "nemo-ray doctor configs/nemotron-3-nano-30b-a3b-lora.yaml",
    ),
    "is another program's": (
        "axolotl train nano-30b-a3b-qlora.yaml",
        "hf download nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 "
        "--local-dir models/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "vllm serve outputs/served",
        "vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules mine=outputs/quickstart/adapter",
    ),
    "needs a model of the reader's; tests/model/test_generate.py": (
        "nemo-ray generate --model MODEL_FOLDER --temperature 0.7 --top-p 0.9 --seed 1 < prompt.txt",
    ),
    "is run with other names by README.md and docs/serving.md": (
        "python -m nemo_ray.export outputs/run --merge --output outputs/merged",
        "python -m nemo_ray.export outputs/run --merge --check --output outputs/merged",
        "python -m nemo_ray.export outputs/run --check",
        "python -m nemo_ray.export outputs/run --per-expert-keys --output outputs/unfused",
    ),
}
"""By reason: commands as the pages have them, less their comments, each in one line."""

PROGRAMS_NOT_RUN = {
    "takes minutes; tests/tune/test_library.py has shorter ones": (
        'best = sweep("configs/sweep-quickstart.yaml", f"tune.parameters={space}", "max_steps=20").best',
        'result = sweep("configs/sweep-quickstart.yaml", "tune.num_trials=4", resume=False, shard="1/1")',
    ),
    "needs a full fine-tune, which no command makes; tests/e2e/test_exports.py": (
        'tokenizer = AutoTokenizer.from_pretrained("outputs/full/model")',
    ),
}
"""By reason: Python blocks, each by one of its lines."""

# -- how the others are run -----------------------------------------------------------------------

QUICKSTART = "python -m nemo_ray.train configs/quickstart.yaml overwrite=true"
STAND_INS = {"make quickstart": QUICKSTART}
"""Where make would also install: the line of its recipe."""
RUNNABLE = (
    "cat > ",
    "mkdir -p ",
    *(f"python -m nemo_ray.{name} " for name in ("data", "export", "train")),
    *(f"nemo-ray {name}" for name in COMMANDS if name not in ("submit", "tune")),
)
"""How commands begin that run here: all that are not in the table."""
TRAINING = ("python -m nemo_ray.train ", "nemo-ray train ")
SHORTER = "max_steps=2 ray.num_workers=1 saves_per_epoch= evals_per_epoch= completion_prompts="
PLACEHOLDERS = ("CONFIG.yaml", "run.yaml")
"""Names for a configuration of the reader's own; here they are the quickstart's."""
LINKED = ("benchmarks", "cluster", "configs", "nemo_ray")
WARNINGS_ONLY = {"nemo-ray doctor": 3}
"""Exit codes beside 0 that are no failure, by the beginning of the command."""
COMMAND_WITHIN_S = 300.0

# -- reading the pages ----------------------------------------------------------------------------

_BLOCK = re.compile(r"^( *)```(bash|python)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(?:^|\s+)#\s.*$")
_HERE_DOCUMENT = re.compile(r"<<'(\w+)'$")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [dedent(text) for _, of, text in found if of == language]


def commands(block: str) -> Iterator[str]:
    """The commands of a block without comments: continued ones in one line, here-documents with theirs."""
    lines = iter(block.splitlines())
    for line in lines:
        command = _COMMENT.sub("", line)
        while command.endswith("\\"):
            command = command.removesuffix("\\") + _COMMENT.sub("", next(lines)).lstrip()
        if begins := _HERE_DOCUMENT.search(command):
            document = iter(lambda: next(lines), begins[1])
            command = "\n".join((command, *document, begins[1]))
        if command:
            yield command


def commands_of(page: Path) -> list[str]:
    """All commands of a page, in order."""
    return [command for block in blocks(page, "bash") for command in commands(block)]


def in_table(table: Mapping[str, Sequence[str]]) -> list[str]:
    """The rows of a table, whatever the reason."""
    return [row for rows in table.values() for row in rows]


def programs_of(page: Path) -> list[str]:
    """The Python blocks of a page that are run."""
    omitted = set(in_table(PROGRAMS_NOT_RUN))
    return [block for block in blocks(page, "python") if omitted.isdisjoint(block.splitlines())]


# -- nothing is left out --------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_or_in_the_table(page: Path) -> None:
    known = {*in_table(NOT_RUN), *STAND_INS}
    unknown = [one for one in commands_of(page) if one not in known and not one.startswith(RUNNABLE)]
    assert not unknown, f"new in {page.name}: say in NOT_RUN why it cannot run here, or add it to RUNNABLE"


def test_the_tables_have_no_stale_rows() -> None:
    shown = {command for page in PAGES for command in commands_of(page)}
    lines = {line for page in PAGES for block in blocks(page, "python") for line in block.splitlines()}
    stale = [row for row in (*in_table(NOT_RUN), *STAND_INS) if row not in shown]
    stale += [row for row in in_table(PROGRAMS_NOT_RUN) if row not in lines]
    assert not stale, "no page has these any more"


def test_the_stand_in_is_what_make_runs() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nquickstart:")[2].splitlines()[1]
    assert recipe.strip().replace("$(BIN)/", "") == QUICKSTART


def test_commands_are_read_whole() -> None:
    block = "a b   # why\n# alone\n\nc \\\n  d # f\ncat > x.yaml <<'END'\nkey: 1 # kept\nEND\ne --id #1\n"
    wanted = ["a b", "c d", "cat > x.yaml <<'END'\nkey: 1 # kept\nEND", "e --id #1"]
    assert list(commands(block)) == wanted


# -- all others run -------------------------------------------------------------------------------


@dataclass
class Reader:
    """Somebody who follows the pages, in a directory that looks like a clone."""

    folder: Path
    logs: Path
    done: set[str] = field(default_factory=set)

    def follow(self, command: str) -> None:
        """Run a command of a page, unless an earlier page had the same one."""
        if command in self.done or command in in_table(NOT_RUN):
            return
        self.done.add(command)
        line = STAND_INS.get(command, command)
        if line.startswith(TRAINING):
            line = f"{line} {SHORTER}"
        self.run(["bash", "-e", "-c", line], command)

    def run(self, arguments: list[str], shown: str) -> None:
        """Run to the end, within its time, and see that nothing of it stays."""
        started = Command(
            arguments,
            self.logs / f"{len(list(self.logs.iterdir()))}.log",
            cwd=self.folder,
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
        )
        try:
            code = started.end(COMMAND_WITHIN_S)
        finally:
            started.kill_tree()
        fine = {0} | {code for start, code in WARNINGS_ONLY.items() if shown.startswith(start)}
        assert code in fine, f"{shown}\nended with {code}:\n{started.output}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """One for all pages, who has done the quickstart: later pages look at what it left."""
    folder = tmp_path_factory.mktemp("clone")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for name in PLACEHOLDERS:
        (folder / name).symlink_to(ROOT / "configs" / "quickstart.yaml")
    made = Reader(folder, tmp_path_factory.mktemp("logs"))
    made.follow("make quickstart")
    return made


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, reader: Reader) -> None:
    for command in commands_of(page):
        reader.follow(command)
    if programs := programs_of(page):
        reader.run([sys.executable, "-c", "\n".join(programs)], f"the Python of {page.name}")
