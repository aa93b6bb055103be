"""Documentation of what is compiled into the interpreter and has no Python source.

Only modules whose documentation is the same on every platform are read.
"""

import builtins
import cmath
import itertools
import math
import re
import types
from collections.abc import Iterator

from nemo_ray.demo.source import Documented, clean

_MODULES: tuple[types.ModuleType, ...] = (builtins, cmath, itertools, math)
_METHOD_TYPES = (types.MethodDescriptorType, types.ClassMethodDescriptorType, staticmethod)


def compiled_objects() -> Iterator[Documented]:
    """Modules, functions, types and their methods, sorted by name."""
    for module in _MODULES:
        yield Documented(module.__name__, "", "module", "", (), clean(module.__doc__ or ""), True)
        for name, item in sorted(vars(module).items()):
            # The type test leaves out what `site` adds: exit, copyright, license, help.
            if name.startswith("_") or not isinstance(item, type | types.BuiltinFunctionType):
                continue
            kind = "class" if isinstance(item, type) else "function"
            yield _documented(module.__name__, name, kind, item)
            if isinstance(item, type) and item.__name__ == name:
                yield from _methods(module.__name__, name, item)


def _methods(module: str, name: str, owner: type) -> Iterator[Documented]:
    for attribute, member in sorted(vars(owner).items()):
        if not attribute.startswith("_") and isinstance(member, _METHOD_TYPES):
            yield _documented(module, f"{name}.{attribute}", "method", member)


def _documented(module: str, path: str, kind: str, item: object) -> Documented:
    text = getattr(item, "__text_signature__", None) or ""  # absent on a few built-in types
    text = re.sub(r"\(\$\w+(?:, /)?(?:, )?", "(", text)  # the bound first argument
    return Documented(module, path, kind, text, (), clean(getattr(item, "__doc__", None) or ""), True)
