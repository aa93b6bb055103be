"""What a check found: fine, worth knowing, or in a run's way."""

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's.

    `subject`: what was looked at. `remedy`: what to do about it; none where all is well.
    """

    state: str
    subject: str
    says: str
    remedy: str = ""


def ok(subject: str, says: str) -> Finding:
    """All is well."""
    return Finding(OK, subject, says)


def warning(subject: str, says: str, remedy: str) -> Finding:
    """A run goes, but not as well as it could."""
    return Finding(WARNING, subject, says, remedy)


def error(subject: str, says: str, remedy: str) -> Finding:
    """A run would fail."""
    return Finding(ERROR, subject, says, remedy)


def from_line(subject: str, line: str) -> Finding:
    """An error that a run would end with too: what it says after its last semicolon is the remedy."""
    says, _, remedy = line.rpartition("; ")
    return error(subject, says or remedy, remedy if says else "")


def worst(findings: Iterable[Finding]) -> str:
    """The worst state among them."""
    states = {finding.state for finding in findings}
    return next((state for state in (ERROR, WARNING) if state in states), OK)
