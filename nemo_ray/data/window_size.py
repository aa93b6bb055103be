"""The rows of a window, kept from one start to the next.

The size follows from a probe of a source's rows. A file that is added would change the probe, and with it
every window; so the size of a source that fills several windows is written into the prepared directory, and
holds until a probe is off by more than four times.
"""

import json

from nemo_ray.storage import file_facts, open_input, publish_json

_TOLERANCE = 4


def kept_window_size(directory: str, known_by: str, wanted: int, num_rows: int) -> int:
    """The rows per window: those of earlier starts, or `wanted`, which is then kept for later ones.

    Args:
        known_by: a digest of the entry and of all that shapes its shards, beside its rows.
        num_rows: rows of the source; one that fits into a window leaves nothing to keep.
    """
    place = f"{directory}/window-size-{known_by}.json"
    if file_facts(place) is not None:
        with open_input(place) as file:
            kept = int(json.loads(file.read())["rows_per_window"])
        if wanted <= _TOLERANCE * kept and kept <= _TOLERANCE * wanted:
            return kept
    if num_rows > wanted:
        publish_json(place, {"rows_per_window": wanted})
    return wanted
