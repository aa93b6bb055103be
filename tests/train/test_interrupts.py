"""Which signals ask for an end, and which end at once. What a run does then: tests/e2e/test_interrupts.py."""

import os
import signal

import pytest

from nemo_ray.train import interrupts
from nemo_ray.train.interrupts import Interrupts


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many signals had come when the process would have ended at once."""
    found: list[int] = []
    monkeypatch.setattr(Interrupts, "_end", lambda self: found.append(self.count))
    return found


@pytest.mark.parametrize(
    ("number", "echo_s", "counted"),
    [(signal.SIGTERM, 5.0, 1), (signal.SIGTERM, 0.0, 2), (signal.SIGINT, 5.0, 2)],
)
def test_a_second_sigterm_soon_after_is_its_echo(
    number: int, echo_s: float, counted: int, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C never is."""
    monkeypatch.setattr(interrupts, "_ECHO_S", echo_s)
    with Interrupts(lambda: None) as found:
        found.collect()
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert found.count == counted and ended == [2] * (counted - 1)
