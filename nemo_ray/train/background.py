"""Work in a thread of its own."""

import threading
from collections.abc import Callable
from typing import Any


class Background:
    """A function in a thread of its own, its result or its error."""

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most `seconds`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()
