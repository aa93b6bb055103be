"""`python -m nemo_ray.data` as users break it: one clear line each. Processes have a Ray of their own."""

import errno
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from nemo_ray import session
from nemo_ray.data import shards
from nemo_ray.data.__main__ import main
from nemo_ray.data.prepare import window_task
from nemo_ray.data.preparing import Interrupts
from nemo_ray.data.progress import PrepareDisplay, Speed
from nemo_ray.data.review import Prepared
from nemo_ray.data.sources import plan_data
from nemo_ray.errors import DataError
from nemo_ray.train.interrupts import EXIT_CODE
from tests.data.helpers import chats, prepare_all, section, write_lines
from tests.e2e.command import Command

DATA = (sys.executable, "-m", "nemo_ray.data")


def write_config(tmp_path: Path, base: Path, **keys: Any) -> Path:
    path = tmp_path / "run.yaml"
    values = {
        "base_model": str(base),
        "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
        "sequence_len": 128,
        "output_dir": str(tmp_path / "out"),
        **keys,
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "start_local", lambda *_: pytest.fail("refused before Ray is started"))


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# -- refused before Ray -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "code", "words"),
    [
        ({"datasets": [{"path": "missing.jsonl"}]}, 2, "missing.jsonl"),
        ({"max_rejected_shares": 0.1}, 2, "max_rejected_share"),
        ({"max_rejected_share": 1.5}, 2, "max_rejected_share"),
        ({"datasets": [{"path": "EMPTY"}]}, 1, "holds no rows"),
        ({"dataset_prepared_path": "FILE"}, 1, "dataset_prepared_path: .* cannot be written: "),
    ],
    ids=["missing-file", "wrong-key", "wrong-share", "no-rows", "not-a-folder"],
)
def test_a_refusal_is_one_line(
    base: Path,
    tmp_path: Path,
    keys: dict[str, Any],
    code: int,
    words: str,
    no_ray: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", chats(40))
    (tmp_path / "empty.jsonl").write_text("")
    places = {"EMPTY": str(tmp_path / "empty.jsonl"), "FILE": str(rows)}
    text = yaml.safe_dump(keys)
    for name, place in places.items():
        text = text.replace(name, place)
    assert main([str(write_config(tmp_path, base, **yaml.safe_load(text)))]) == code
    assert re.search(words, told(capsys))


def test_an_error_that_quotes_a_row_controls_no_terminal(
    base: Path, tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('no role ' + messages[0]['role']) }}")
    rows = [{"messages": [{"role": f"\x1b]0;mine\x07 {i}"}, {"role": "assistant"}]} for i in range(9)]
    for row in rows:
        for message in row["messages"]:
            message["content"] = "x"
    write_lines(tmp_path / "rows.jsonl", rows)
    assert main([str(write_config(tmp_path, base, chat_template=str(template)))]) == 1
    assert "(TemplateError: no role ␛]0;mine␇ 0)" in told(capsys)


@pytest.mark.parametrize("text", ["-1", "x", "1.5"])
def test_show_takes_a_whole_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run.yaml", f"--show={text}"])
    assert "is no whole number" in capsys.readouterr().err


def test_a_signal_while_ray_starts_waits_for_it() -> None:
    steps = []
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            steps.append("Ray is up")
        steps.append("never")
    assert steps == ["Ray is up"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_output_folder_that_takes_no_page_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", chats(40))
    assert main([str(write_config(tmp_path, base, output_dir=str(rows))), "--show", "1"]) == 1
    assert "output_dir: " in told(capsys)


def test_a_prepared_folder_that_cannot_be_written_can_be_used(
    base: Path, tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_ray.data import review

    rows: list[Any] = [*chats(60), {"other": 1}]
    data = section(write_lines(tmp_path / "rows.jsonl", rows))
    prepared = tmp_path / "prepared"
    prepare_all(plan_data(data, str(base), str(prepared)), data, base)
    publish = review.publish_bytes

    def read_only(path: Path, content: bytes) -> None:
        if Path(path).parent == prepared:
            raise OSError(errno.EROFS, "Read-only file system")
        publish(path, content)

    monkeypatch.setattr(review, "publish_bytes", read_only)
    config = write_config(tmp_path, base, dataset_prepared_path=str(prepared))
    assert main([str(config)]) == 0
    assert (tmp_path / "out" / "rejected.jsonl").exists()


def test_a_full_disk_is_told_by_the_task(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ray.data.pipeline import prepare_task

    data = section(write_lines(tmp_path / "rows.jsonl", chats(40)))
    plan = plan_data(data, str(base), str(tmp_path / "prepared"))
    task = window_task(plan, plan.windows[0], data, str(base), held_out=False)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "publish_bytes", full)
    error = pickle.loads(prepare_task(task)["error"])
    assert isinstance(error, DataError)
    assert re.fullmatch("dataset_prepared_path: .*arrow cannot be written: No space left on .*", str(error))


# -- progress -----------------------------------------------------------------------------------------


def told_of(windows: int, new_rows: int, num_windows: int = 40) -> Prepared:
    return Prepared(windows, num_windows, new_rows, new_rows * 100, (num_windows - windows) * 1000)


def test_speed_counts_from_the_first_new_shard() -> None:
    times = iter([10.0, 20.0])
    speed = Speed(lambda: next(times))
    assert speed.status_line(told_of(1, 0)) == speed.status_line(told_of(1, 1000)) == "1/40 windows"
    line = speed.status_line(told_of(11, 11_000))
    assert line == "11/40 windows  1,000 rows/s  100 k tokens/s  ETA 0:29"


def test_a_log_gets_about_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with PrepareDisplay(Console(highlight=False)) as display:
        for done in range(401):
            display.tell(told_of(100 + done, done * 1000, num_windows=500))
            display.draw()
    lines = capsys.readouterr().out.splitlines()
    assert 8 <= len(lines) <= 10 and lines[-1].startswith("500/500 windows  ")


# -- whole processes ----------------------------------------------------------------------------------


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        if command.process.poll() is None or command.tree():
            command.kill_tree()


@pytest.fixture
def many_rows(base: Path, tmp_path: Path) -> Path:
    """Enough to be stopped on the way: some 40 windows."""
    write_lines(tmp_path / "rows.jsonl", chats(2000) * 8)
    return write_config(tmp_path, base)


def start(commands: list[Command], config: Path, *overrides: str) -> Command:
    log = config.with_name(f"log-{len(commands)}.txt")
    commands.append(Command([*DATA, str(config), *overrides], log))
    return commands[-1]


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(240)
def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(
    many_rows: Path, commands: list[Command]
) -> None:
    prepared = many_rows.with_name("out") / "prepared"
    first = start(commands, many_rows)
    first.wait_until(lambda: list(prepared.glob("*.arrow")))
    first.ctrl_c()
    assert first.end(60) == EXIT_CODE
    line = first.output.splitlines()[-1]
    told = re.fullmatch(r"stopped; (\d+) of (\d+) windows are prepared, the same command goes on", line)
    assert told is not None and "Traceback" not in first.output, first.output
    assert 0 < int(told[1]) == len(list(prepared.glob("*.arrow"))) < int(told[2])
    assert first.leaves_nothing_behind() and not list(prepared.glob("failed-*"))
    before = {path: path.stat().st_mtime_ns for path in prepared.glob("*.arrow")}

    second = start(commands, many_rows)
    assert second.end(200) == 0, second.output
    assert len(list(prepared.glob("*.arrow"))) == int(told[2])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert re.search(
        r"^prepared in [\d.]+ s, Ray's start included: .* tokens/s$", second.output, re.MULTILINE
    )
    third = start(commands, many_rows)
    assert third.end(60) == 0 and "windows were prepared already" in third.output


@pytest.mark.e2e
@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_second_ctrl_c_ends_at_once(many_rows: Path, commands: list[Command]) -> None:
    command = start(commands, many_rows)
    command.wait_until(lambda: list((many_rows.with_name("out") / "prepared").glob("*.arrow")))
    command.ctrl_c()
    command.process.send_signal(signal.SIGTERM)
    assert command.end(10) == EXIT_CODE
    assert command.leaves_nothing_behind(60), command.tree()


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_disk_that_fills_up_is_one_line(many_rows: Path, tmp_path: Path, commands: list[Command]) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, timeout=30).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        command = start(commands, many_rows, f"dataset_prepared_path={place}")
        assert command.end(100) == 1
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)
    (line,) = command.errors
    assert "dataset_prepared_path" in line and "No space left on device" in line, command.output
    assert "Traceback" not in command.output and command.leaves_nothing_behind()


def test_a_higher_share_reuses_the_shards(base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chats(300))
    plans = [
        plan_data(section(path, max_rejected_share=share), str(base), str(tmp_path)) for share in (0.0, 0.5)
    ]
    assert plans[0] == plans[1]
