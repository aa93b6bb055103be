"""Log lines of a worker name its rank and step, and go as far as they are asked for."""

import logging

import pytest

from nemo_ray.train.logs import LEVEL_VARIABLE, placed

log = logging.getLogger("a.library")


def test_lines_have_rank_and_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "INFO")
    steps = iter((4, 5))
    with placed(3, lambda: next(steps)):
        log.info("saving")
        log.warning("slow %s", "disk")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("INFO rank 3 step 4 a.library: saving")
    assert second.endswith("WARNING rank 3 step 5 a.library: slow disk")


def test_only_warnings_without_being_asked(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    with placed(0, lambda: 0):
        log.info("saving")
        log.warning("slow")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("rank 0 step 0 a.library: slow")
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
