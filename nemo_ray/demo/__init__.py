"""The demo: committed data, tokenizer and base model, and the recipe that rebuilds them.

`assets/` is what the quickstart trains on; `python -m nemo_ray.demo` makes it again from the
documentation inside Python's own standard library and compares. Nothing but the command line
imports this package.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
