"""Names in files that others wrote: is one the plain name of a file beside it, and leads nowhere else?"""

import os


def is_bare(name: object) -> bool:
    """Whether `name` is a file's name alone: no folder, no drive, no way up."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", os.sep}
