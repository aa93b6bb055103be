"""Random numbers as a pure function of names and counts: the same on every machine and in every version."""

import hashlib
import json

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]


def hashes(seed: bytes, first: int, last: int) -> UInt64:
    """Uniform 64-bit numbers first..last-1 of the sequence that `seed` names.

    Source: splitmix64 (Steele, Lea and Flood, 2014), which gives its n-th number without those before.
    """
    start = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "little")
    value = np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: UInt64 = value ^ (value >> np.uint64(31))
    return result


def shuffled(size: int, *name: object) -> npt.NDArray[np.int64]:
    """(size,) a permutation that the parts of `name` (JSON values) determine."""
    return np.argsort(hashes(json.dumps(name).encode(), 0, size), kind="stable").astype(np.int64)


class Choices:
    """A sequence of numbers by their index, made in blocks: near indices cost next to nothing."""

    _BLOCK = 4096

    def __init__(self, *name: object) -> None:
        self._seed = json.dumps(name).encode()
        self._block = -1
        self._values: list[int] = []

    def __getitem__(self, index: int) -> int:
        block, offset = divmod(index, self._BLOCK)
        if block != self._block:
            start = block * self._BLOCK
            self._block, self._values = block, hashes(self._seed, start, start + self._BLOCK).tolist()
        return self._values[offset]
