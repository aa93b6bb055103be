"""How often lost workers are started again: a count of failures without progress, as pure arithmetic."""


class Restarts:
    """The failures of one run so far. A checkpoint that is newer than the last failure's forgives them."""

    def __init__(self, max_failures: int) -> None:
        """max_failures: how many without a new checkpoint between them are answered by a restart; -1: all."""
        self.max_failures = max_failures
        self.made = 0
        self.in_a_row = 0
        self._step: int | None = None

    def allows(self, newest_step: int) -> bool:
        """Count a failure that finds `newest_step` as the newest checkpoint (0 for none), and judge it."""
        if self._step is not None and newest_step > self._step:
            self.in_a_row = 0
        self._step = newest_step
        self.in_a_row += 1
        if 0 <= self.max_failures < self.in_a_row:
            return False
        self.made += 1
        return True

    def describe(self) -> str:
        """Why there is no further restart."""
        failures = f"{self.in_a_row} failure{'s' if self.in_a_row > 1 else ''}"
        return (
            f"that makes {failures} without a new checkpoint, and ray.max_failures is {self.max_failures} "
            f"({self.made} restart{'' if self.made == 1 else 's'} in all)"
        )
