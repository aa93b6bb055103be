"""What those who are not trusted may send: pickles, code and links that leave a mark where they are obeyed.

A mark is a folder: whoever loads the pickle, or runs the code, makes it.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class _Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self._mark,)


def bait(mark: Path) -> Any:
    return _Bait(mark)


def pickled(mark: Path) -> bytes:
    return pickle.dumps({"model.embeddings.weight": _Bait(mark)})


def write_pickle(path: Path, mark: Path) -> None:
    """As torch writes it (a zip) where the suffix says so, else a bare pickle."""
    path.unlink(missing_ok=True)
    if path.suffix in (".bin", ".pt", ".pth"):
        torch.save({"model.embeddings.weight": _Bait(mark)}, path)
    else:
        path.write_bytes(pickled(mark))


def code(mark: Path) -> str:
    """Python that leaves the mark when it is imported."""
    return f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"


def is_one_line(text: str) -> bool:
    return bool(text.strip()) and "\n" not in text.strip()
