"""Which signals ask for an end, and which end at once. What a run does then: tests/e2e/test_interrupts.py."""

import os
import signal

import pytest

from nemo_ray.train import interrupts
from nemo_ray.train.interrupts import Interrupts


def test_a_sigterm_and_its_echo_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(Interrupts, "_end", lambda self: ended.append(self.count))
    with Interrupts(lambda: None) as found:
        found.collect()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert found.count == 1 and not ended
        monkeypatch.setattr(interrupts, "_ECHO_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert found.count == 2 and ended == [2]


def test_a_second_ctrl_c_is_never_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(Interrupts, "_end", lambda self: ended.append(self.count))
    with Interrupts(lambda: None) as found:
        found.collect()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert found.count == 2 and ended == [2]
