"""A worker's log lines say which rank wrote them, in which step. They go to the worker's log file, which Ray
keeps, and with --verbose to the driver's terminal as well.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

LEVEL_VARIABLE = "NEMO_RAY_LOG_LEVEL"
FORMAT = "%(asctime)s %(levelname)s rank %(rank)d step %(step)d %(name)s: %(message)s"


@contextlib.contextmanager
def placed(rank: int, step: Callable[[], int]) -> Iterator[None]:
    """Write all of this process's log lines with their place. `step`: the one that is done now."""

    def place(record: logging.LogRecord) -> bool:
        record.rank, record.step = rank, step()
        return True

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(place)
    root, level = logging.getLogger(), os.environ.get(LEVEL_VARIABLE, "WARNING")
    before = root.level, root.handlers[:]
    root.handlers[:] = [handler]
    root.setLevel(level)
    try:
        yield
    finally:
        root.handlers[:] = before[1]
        root.setLevel(before[0])
