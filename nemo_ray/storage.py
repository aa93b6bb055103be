"""Atomic writes: a file or folder is there whole, or not at all.

Owns how things reach a shared file system. What they mean is the callers' business.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any


def _aside(path: Path) -> Path:
    """A name beside `path` that no other writer uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def publish_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what was there, so that no reader ever sees a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _aside(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    publish_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read one JSON file; raises FileNotFoundError or json.JSONDecodeError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def publish_folder(partial: str | Path, path: str | Path) -> None:
    """Give a finished folder its name, replacing what was there."""
    partial, path = Path(partial), Path(path)
    if path.exists():
        retired = _aside(path)
        os.replace(path, retired)
        os.replace(partial, path)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(partial, path)


def remove_tree(path: str | Path) -> None:
    """Delete a folder in one visible step: it is renamed first, so that no half-deleted one is ever read."""
    path = Path(path)
    if path.exists():
        retired = _aside(path)
        os.replace(path, retired)
        shutil.rmtree(retired)
