"""A file that lies elsewhere, read by ranges; how a range is asked for is the subclass's business."""

import io
import os
from abc import abstractmethod
from typing import Any


class RangeFile(io.RawIOBase):
    """For reading, from any place in it: each `readinto` is one request, of just what is asked for."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._position = 0

    @abstractmethod
    def read_range(self, start: int, count: int) -> bytes:
        """`count` bytes, which are there, from `start`. Raises OSError, or a NemoRayError."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readall(self) -> bytes:
        """In one request, where the default makes one for every 8 KiB."""
        count = max(0, self._size - self._position)
        data = self.read_range(self._position, count) if count else b""
        self._position += count
        return data

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            buffer[:count] = self.read_range(self._position, count)
            self._position += count
        return count
