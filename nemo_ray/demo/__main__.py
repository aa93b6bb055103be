"""`python -m nemo_ray.demo`: rebuild the demo's assets and compare them with the committed ones."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemo_ray.config.command_line import CommandParser
from nemo_ray.demo import ASSETS
from nemo_ray.demo.base import LOSS_TOLERANCE, held_out_loss, rebuild_base
from nemo_ray.demo.recipe import PYTHON, build, differing_files, differs_from_builder
from nemo_ray.errors import NemoRayError, tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when the rebuilt files equal the committed ones, 1 and their names otherwise."""
    parser = CommandParser(
        prog="python -m nemo_ray.demo",
        description="Rebuild data, tokenizers and configs of the demo and compare them with the "
        f"committed assets. They were built with CPython {PYTHON}; other versions document "
        "themselves in other words.",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="build there and keep it; compares with --check only"
    )
    parser.add_argument("--check", action="store_true", help="compare; the default without --out")
    parser.add_argument("--base", action="store_true", help="also pre-train the base's weights (15 minutes)")
    options = parser.parse(arguments)
    reason = differs_from_builder()
    if reason is not None:
        print(f"note: {reason}")
    try:
        if options.out is not None:
            return _run(options.out, options.check, options.base)
        with tempfile.TemporaryDirectory(prefix="nemo-ray-demo-") as folder:
            return _run(Path(folder) / "assets", True, options.base)
    except NemoRayError as error:
        return tell(error)


def _run(folder: Path, check: bool, base: bool) -> int:
    build(folder)
    print(f"built data, tokenizers and configs in {folder}")
    differing = differing_files(folder, ASSETS) if check else []
    for name in differing:
        print(f"differs: {name}")
    if base:
        with tempfile.TemporaryDirectory(prefix="nemo-ray-demo-run-") as run_dir:
            rebuild_base(folder, Path(run_dir) / "run")
        if check and not _same_loss(folder):
            differing.append("base/model.safetensors")
    if check and not differing:
        print(f"equal to {ASSETS}" + ("" if base else " (weights not rebuilt: see --base)"))
    return 1 if differing else 0


def _same_loss(folder: Path) -> bool:
    chats = ASSETS / "chats-heldout.jsonl"
    built, committed = held_out_loss(folder / "base", chats), held_out_loss(ASSETS / "base", chats)
    print(f"held-out loss of the rebuilt base {built:.4f}, of the committed one {committed:.4f}")
    return abs(built - committed) <= LOSS_TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
