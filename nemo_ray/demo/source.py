"""Documentation inside the standard library, as plain objects in a fixed order.

Owns: which files are read, what counts as documentation, how it is cleaned. The files are parsed,
never imported, so that nothing runs and no address or path of this machine can reach the text.
What is compiled into the interpreter (`builtins`) has no source: see `compiled.py`.
"""

import ast
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Folders that are no library documentation, differ between builds, or are left out by distributors.
_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "lib-dynload")
    + ("pydoc_data", "idlelib", "turtledemo", "lib2to3", "ensurepip", "_vendor", "__phello__")
)
_SKIPPED_PREFIXES = (
    "config-",
    "_sysconfigdata",
    "__hello__",
    "_aix_support",
    "sitecustomize",
    "usercustomize",
)
# Python twins of modules that users know by another name.
_PUBLIC_NAMES = {
    "_pyio": "io",
    "_pydecimal": "decimal",
    "_collections_abc": "collections.abc",
    "_weakrefset": "weakref",
    "posixpath": "os.path",
    "concurrent.futures._base": "concurrent.futures",
}
_AUTHOR_LINE = re.compile(r"<[^<>\s]+@[^<>\s]+>|[\w.+-]+@[\w-]+\.(?:com|org|net|edu)\b|(?i:\bcopyright\b)")
_LEGAL = re.compile(r"(?i)\b(copyright|licen[cs]e[ds]?|warrant|permission)\b|[\w.+-]+@[\w-]+\.\w+|-\*-|XXX")
_LONGEST_SIGNATURE = 240


@dataclass(frozen=True)
class Parameter:
    """One parameter: `star` is "", "*" or "**"; `default` is source text or None."""

    name: str
    star: str
    default: str | None
    keyword_only: bool


@dataclass(frozen=True)
class Documented:
    """A module, class, function, method or property, with or without a docstring."""

    module: str
    path: str  # name inside the module; "" is the module itself
    kind: str  # module, class, function, method, class method, static method, property
    signature: str  # "(a, b=1)" without self; "" where there is none
    parameters: tuple[Parameter, ...]
    doc: str  # cleaned docstring, "" where there is none
    public: bool

    @property
    def name(self) -> str:
        """The full dotted name; built-in names carry no module."""
        if not self.path:
            return self.module
        return self.path if self.module == "builtins" else f"{self.module}.{self.path}"

    @property
    def parent(self) -> str:
        """Path of the enclosing class, "" at the top of a module."""
        return self.path.rpartition(".")[0]


def clean(doc: str) -> str:
    """A docstring without indentation, author and copyright lines, and runs of empty lines."""
    lines = [line.rstrip() for line in inspect.cleandoc(doc).splitlines()]
    text = "\n".join(line for line in lines if not _AUTHOR_LINE.search(line))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def squeezed(text: str) -> str:
    """`text` with every run of white space as one space: what containment is judged on."""
    return " ".join(text.split())


def source_files(root: Path) -> list[tuple[str, Path]]:
    """(module name, file) of every library module under `root`, sorted by name."""
    found: list[tuple[str, Path]] = []
    pending = [root]
    while pending:
        for entry in pending.pop().iterdir():
            if entry.name in _SKIPPED_FOLDERS or entry.name.startswith(_SKIPPED_PREFIXES):
                continue
            if entry.is_dir():
                pending.append(entry)
            elif entry.suffix == ".py":
                parts = entry.relative_to(root).with_suffix("").parts
                dotted = ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)
                if parts[-1] != "__main__":
                    found.append((_PUBLIC_NAMES.get(dotted, dotted), entry))
    return sorted(found, key=lambda item: (item[0], item[1].name))


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_source(path: Path) -> str:
    """Source text of one file in its declared encoding, with plain newlines."""
    with tokenize.open(path) as file:
        return file.read()


def documented_objects(files: Iterable[tuple[str, Path]]) -> Iterator[Documented]:
    """Every definition of the files, depth first in source order; the first of a name wins."""
    seen: set[tuple[str, str]] = set()
    for module, path in files:
        tree = ast.parse(read_source(path))
        public = not any(part.startswith("_") for part in module.split("."))
        found = [Documented(module, "", "module", "", (), clean(ast.get_docstring(tree) or ""), public)]
        found.extend(_walk(tree.body, module, "", public))
        for item in found:
            if (item.module, item.path) not in seen:
                seen.add((item.module, item.path))
                yield item


def comments(source: str) -> Iterator[str]:
    """Blocks of at least three comment lines, without hashes, legal notices and disabled code."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").rstrip())
            continue
        raw = "\n".join(["", *block])
        text = clean(raw)
        if len(block) >= 3 and len(text) >= 200 and not _LEGAL.search(raw) and not _parses(text):
            yield text
        block = []


def _parses(text: str) -> bool:
    """Whether a comment is code that was commented out."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _definitions(body: Iterable[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.For | ast.While):
            yield from _definitions([*node.body, *node.orelse])
        elif isinstance(node, ast.With):
            yield from _definitions(node.body)
        elif isinstance(node, ast.Try):
            handled = [statement for handler in node.handlers for statement in handler.body]
            yield from _definitions([*node.body, *node.orelse, *handled, *node.finalbody])


def _walk(body: Iterable[ast.stmt], module: str, parent: str, public: bool) -> Iterator[Documented]:
    for node in _definitions(body):
        path = f"{parent}.{node.name}" if parent else node.name
        is_public = public and not node.name.startswith("_")
        doc = clean(ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef):
            init = next((d for d in _definitions(node.body) if d.name == "__init__"), None)
            arguments = None if init is None or isinstance(init, ast.ClassDef) else init.args
            signature, parameters = ("", ()) if arguments is None else _signature(arguments, True)
            yield Documented(module, path, "class", signature, parameters, doc, is_public)
            yield from _walk(node.body, module, path, is_public)
            continue
        kind = _function_kind(node, bool(parent))
        if kind is None:
            continue
        signature, parameters = _signature(node.args, bool(parent) and kind != "static method")
        if kind == "property":
            signature, parameters = "", ()
        yield Documented(module, path, kind, signature, parameters, doc, is_public)


def _function_kind(node: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> str | None:
    """The kind of a function definition; None for the setters and overloads of another."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if any(d.endswith((".setter", ".deleter", "overload")) for d in decorators):
        return None
    if any(d.endswith(("property", "property()")) or d == "DynamicClassAttribute" for d in decorators):
        return "property"
    coroutine = "coroutine " if isinstance(node, ast.AsyncFunctionDef) else ""
    if not in_class:
        return coroutine + "function"
    if "staticmethod" in decorators:
        return "static method"
    return "class method" if "classmethod" in decorators else coroutine + "method"


def _signature(args: ast.arguments, bound: bool) -> tuple[str, tuple[Parameter, ...]]:
    """Signature text and parameters, without the first parameter of a bound method."""
    positional = [*args.posonlyargs, *args.args]
    padding: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    defaults = [*padding, *args.defaults]
    listed = [Parameter(a.arg, "", _default(d), False) for a, d in zip(positional, defaults, strict=True)]
    if args.vararg is not None:
        listed.append(Parameter(args.vararg.arg, "*", None, False))
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        listed.append(Parameter(argument.arg, "", _default(default), True))
    if args.kwarg is not None:
        listed.append(Parameter(args.kwarg.arg, "**", None, False))
    num_only = len(args.posonlyargs)
    if bound and positional:
        listed, num_only = listed[1:], max(num_only - 1, 0)
    parts: list[str] = []
    for index, item in enumerate(listed):
        if item.keyword_only and not any(p.startswith("*") for p in parts):
            parts.append("*")
        parts.append(item.star + item.name + ("" if item.default is None else f"={item.default}"))
        if index + 1 == num_only:
            parts.append("/")
    text = f"({', '.join(parts)})"
    return (text if len(text) <= _LONGEST_SIGNATURE else f"({', '.join(parts[:6])}, ...)"), tuple(listed)


def _default(node: ast.expr | None) -> str | None:
    if node is None:
        return None
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else "..."
