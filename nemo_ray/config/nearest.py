"""The known name that an unknown key was probably meant to be."""

import difflib
import re
from collections.abc import Sequence

from nemo_ray.config.axolotl import FOREIGN_IN_DATASETS, RENAMED, RENAMED_IN_DATASETS, lookup
from nemo_ray.config.axolotl_keys import FOREIGN
from nemo_ray.config.schema import Config, DatasetSpec, RaySection
from nemo_ray.config.translate import DATASET_KEYS, FOLDED_KEYS, show

_SECRET = re.compile(r"token$|key$|secret|passw|credential", re.IGNORECASE)
"""Names of keys whose values are not repeated."""


def dotted(place: Sequence[str | int]) -> str:
    """The place as one name; a part that would break the line is quoted."""
    parts = [str(part) for part in place]
    return ".".join(part if part.isprintable() else repr(part) for part in parts)


def unknown_key(place: tuple[str | int, ...], value: object) -> str:
    """The line for a key that nobody knows, at `place` (such as `("datasets", 0, "fild")`)."""
    key, best = dotted(place), nearest(place)
    advice = f"did you mean {best}?" if best else "remove it (docs/config.md lists the keys)"
    shown = "" if _SECRET.search(str(place[-1])) else f" {show(value)}:"
    return f"{key}:{shown} unknown key; {advice}"


def nearest(place: tuple[str | int, ...]) -> str | None:
    """The nearest known key: one of the same section, else the same name in another section, else None."""
    name = str(place[-1])
    top = [*Config.model_fields, *lookup(FOREIGN), *RENAMED, *FOLDED_KEYS]
    in_datasets = [*DatasetSpec.model_fields, *lookup(FOREIGN_IN_DATASETS), *RENAMED_IN_DATASETS]
    sections = {"": top, "ray.": list(RaySection.model_fields), "datasets.0.": in_datasets}
    own = "ray." if place[0] == "ray" else "datasets.0." if place[0] in DATASET_KEYS else ""
    own_prefix = ".".join(str(part) for part in place[:-1])
    own_prefix = own_prefix + "." if own_prefix else ""
    for prefix, names in sections.items():
        if prefix != own and name in names:
            return prefix + name
    written = name.lower().replace("-", "_")
    # A key that runs here is the better guess than one that only gets a line.
    runs = DatasetSpec.model_fields if own == "datasets.0." else Config.model_fields
    close = difflib.get_close_matches(
        written, [key for key in sections[own] if key in runs], n=1, cutoff=0.75
    )
    close = close or difflib.get_close_matches(written, sections[own], n=1, cutoff=0.6)
    return own_prefix + close[0] if close else None
