"""Wrong arguments of any command are an error of one line, with exit code 2, and no usage."""

from collections.abc import Sequence

import pytest

from nemo_ray.cli import COMMANDS, main
from nemo_ray.config import docs
from nemo_ray.config.command_line import CommandParser

TAKE_OVERRIDES = ("train", "tune", "submit", "plan", "doctor", "prepare")
Capture = pytest.CaptureFixture[str]


def refused(arguments: Sequence[str], capsys: Capture) -> list[str]:
    """The lines that the command ends with, without `error: `."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == ""
    lines = told.err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), ["tune", "merge"]], ids=" ".join)
def test_an_unknown_option(command: list[str], capsys: Capture) -> None:
    (line,) = refused([*command, "x", "--nothing"], capsys)
    assert line.startswith("--nothing: no such option; `") and " --help` lists them" in line


@pytest.mark.parametrize("name", TAKE_OVERRIDES)
def test_an_override_with_dashes_is_told_how_it_is_written(name: str, capsys: Capture) -> None:
    (line,) = refused([name, "x.yaml", "--lora-r=3", "learning_rate=1e-4"], capsys)
    assert line == "--lora-r=3: overrides take no dashes; write lora_r=3"
    (line,) = refused([name, "x.yaml", "--lora_r", "3"], capsys)
    assert line.startswith("--lora_r: no such option") and line.endswith("keys are key=value")
    lines = refused([name, "x.yaml", "--lora_r=3", "--warmup_steps=4"], capsys)
    assert [line.partition(":")[0] for line in lines] == ["--lora_r=3", "--warmup_steps=4"]


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"doctor", "generate"}))
def test_only_what_is_required_is_called_so(name: str, capsys: Capture) -> None:
    (line,) = refused([name], capsys)
    assert line.startswith("the following arguments are required: ") and "key=value" not in line
    assert " --help` says more" in line


@pytest.mark.parametrize("name", ["export", "status", "report", "generate"])
def test_one_argument_too_many(name: str, capsys: Capture) -> None:
    (line,) = refused([name, "one", "two"], capsys)
    assert line.startswith("two: one argument too many; `")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "x", "--price", "much"], "--price: invalid float value: 'much'; `nemo-ray plan --help`"),
        (["export", "x", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["tune", "x", "--shard"], "--shard: expected one argument"),
        (["train", "x", "--verbose=yes\nno"], "--verbose: ignored explicit argument 'yes"),
    ],
)
def test_wrong_values(arguments: list[str], said: str, capsys: Capture) -> None:
    (line,) = refused(arguments, capsys)
    assert line.startswith(said)


def test_the_page_writers_too(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["docs", "--nothing"])
    with pytest.raises(SystemExit, match="2"):
        docs.write(docs.reference)
    assert capsys.readouterr().err == "error: --nothing: no such option; `docs --help` lists them\n"


def test_options_and_overrides_come_in_any_order() -> None:
    parser = CommandParser()
    parser.add_argument("config")
    parser.add_overrides()
    parser.add_argument("--json", action="store_true")
    given = parser.parse(["run.yaml", "a=1", "--json", "b=2"])
    assert (given.config, given.overrides, given.json) == ("run.yaml", ["a=1", "b=2"], True)
    assert parser.parse(["run.yaml"]).overrides == []
