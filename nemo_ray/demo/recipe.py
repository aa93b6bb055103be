"""The recipe: build every asset but the base's weights into a folder, and compare two folders.

Built with CPython `PYTHON` and tokenizers `TOKENIZERS`. Documentation changes between Python
releases, so under another version the bytes differ; `differs_from_builder` says so.
"""

import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from nemo_ray.demo.chats import chat_rows
from nemo_ray.demo.library import read_library
from nemo_ray.demo.notice import write_notices
from nemo_ray.demo.shapes import BASE_VOCAB, LATENT_VOCAB, base_config, latent_config, write_config
from nemo_ray.demo.source import source_files, standard_library
from nemo_ray.demo.text import text_rows
from nemo_ray.demo.tokenizer import write_tokenizer

PYTHON = "3.11.7"
TOKENIZERS = "0.23.3"
WEIGHTS = "base/model.safetensors"  # rebuilt by `base.rebuild_base`, compared by its loss


def differs_from_builder() -> str | None:
    """Why rebuilt files may differ from the committed ones here, or None."""
    here = f"{platform.python_implementation()} {platform.python_version()}"
    if here != f"CPython {PYTHON}":
        return f"the assets were built with CPython {PYTHON}, this is {here}: its documentation differs"
    if version("tokenizers") != TOKENIZERS:
        return f"the tokenizers were built with tokenizers {TOKENIZERS}, this is {version('tokenizers')}"
    return None


def build(folder: Path) -> None:
    """Write data, tokenizers, configs and notices into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    root = standard_library()
    library = read_library(root)
    text = text_rows(library)
    chats, held_out = chat_rows(library)
    write_rows(folder / "text.jsonl", text)
    write_rows(folder / "chats.jsonl", chats)
    write_rows(folder / "chats-heldout.jsonl", held_out)
    training = [row["text"] for row in text]
    training += [message["content"] for row in chats for message in row["messages"]]
    for name, config, vocab in (
        ("base", base_config(), BASE_VOCAB),
        ("latent", latent_config(), LATENT_VOCAB),
    ):
        write_config(folder / name, config)
        write_tokenizer(folder / name, training, vocab)
    write_notices(folder, root, source_files(root), platform.python_version())


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """Write JSON lines in UTF-8 with plain newlines, the same bytes on every platform."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lines.encode("utf-8"))


def differing_files(built: Path, committed: Path) -> list[str]:
    """Relative names of files that only one folder has or whose bytes differ, without the weights."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (built, committed)
        for path in folder.rglob("*")
        if path.is_file()
    }
    return [name for name in sorted(names - {WEIGHTS}) if _bytes(built / name) != _bytes(committed / name)]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
