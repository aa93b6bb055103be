"""Files of JSON rows that a kill may cut short: appended to, and read without what was cut."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A row as its line."""
    return json.dumps(dict(row), ensure_ascii=False).encode() + b"\n"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row; the file, and the folder around it, are made where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill cut the last row short: it ends here
                file.write(b"\n")
        file.write(encode_row(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows; none where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return rows
