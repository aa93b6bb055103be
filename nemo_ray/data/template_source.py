"""What a chat template's source shows of its text, whatever the messages.

Owns two proofs. A template that only walks once over the messages, from the first to the last, and never
looks at those that follow, appends: it cannot rewrite what it wrote for earlier ones. And one that asks for
`add_generation_prompt` once, at its end, writes the prompt behind the text without it. Where a source does
not show this, the renderings of a row are compared, see turns.py.
"""

from collections.abc import Iterator

from jinja2 import nodes

_LOOKS_BACK = frozenset({"index", "index0", "first", "previtem", "cycle", "changed", "depth", "depth0"})
"""Attributes of jinja's `loop` that do not depend on the items that follow."""

_MESSAGES, _PROMPT = "messages", "add_generation_prompt"


def appends_only(template: nodes.Template) -> bool:
    """Is the text of a chat's beginning always a beginning of the chat's text? False: it is not shown."""
    loops = [index for index, node in enumerate(template.body) if _walks(node)]
    if len(loops) != 1:
        return False
    before, loop, after = template.body[: loops[0]], template.body[loops[0]], template.body[loops[0] + 1 :]
    assert isinstance(loop, nodes.For)
    parts: list[nodes.Node] = [*before, *loop.body, *([loop.test] if loop.test else [])]
    return (
        not loop.else_
        and not loop.recursive
        and all(_only_first(part) and _looks_back(part) for part in parts)
        and all(_only_prompts(node) for node in after)
    )


def _walks(node: nodes.Node) -> bool:
    """`for m in messages`, or in messages[1:]."""
    if not isinstance(node, nodes.For):
        return False
    items: nodes.Node = node.iter
    if isinstance(items, nodes.Getitem) and isinstance(items.arg, nodes.Slice):
        start, stop, step = items.arg.start, items.arg.stop, items.arg.step
        items = items.node if stop is None and step is None and _is_first(start) else node
    return isinstance(items, nodes.Name) and items.name == _MESSAGES


def _is_first(node: nodes.Node | None) -> bool:
    """A constant 0 or 1."""
    return isinstance(node, nodes.Const) and node.value in (0, 1) and not isinstance(node.value, bool)


def _only_first(node: nodes.Node) -> bool:
    """The messages are touched as `messages[0]` alone, which every beginning of a chat has."""
    if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name) and node.node.name == _MESSAGES:
        return isinstance(node.arg, nodes.Const) and node.arg.value == 0
    if isinstance(node, nodes.Name) and node.name in (_MESSAGES, "self", "varargs", "kwargs"):
        return False
    if isinstance(node, (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)):
        return False
    return all(_only_first(child) for child in node.iter_child_nodes())


def _looks_back(node: nodes.Node) -> bool:
    """The outer loop's `loop` is asked for nothing that depends on later messages."""
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
        return node.attr in _LOOKS_BACK
    if isinstance(node, nodes.Name) and node.name == "loop":
        return False
    return all(_looks_back(child) for child in _of_outer_loop(node))


def _of_outer_loop(node: nodes.Node) -> Iterator[nodes.Node]:
    """Children in which `loop` means the same as outside: not the body of an inner loop."""
    if isinstance(node, nodes.For):
        yield from (node.iter, *([node.test] if node.test else []), *node.else_)
    else:
        yield from node.iter_child_nodes()


def mark_prompt(template: nodes.Template, mark: str) -> bool:
    """Let the template write `mark` before its generation prompt: what stands before is the text without one.

    Changes the template. False, and nothing is changed, where it is not shown.
    """
    asked = [name for name in template.find_all(nodes.Name) if name.name == _PROMPT]
    ends = [node for node in template.body if not _is_empty(node)]
    last = ends[-1] if ends else None
    if not (isinstance(last, nodes.If) and _only_prompts(last) and len(asked) == 1):
        return False
    last.body.insert(0, nodes.Output([nodes.TemplateData(mark)]))
    return True


def _is_empty(node: nodes.Node) -> bool:
    """Writes nothing."""
    return isinstance(node, nodes.Output) and all(
        isinstance(part, nodes.TemplateData) and not part.data for part in node.nodes
    )


def _only_prompts(node: nodes.Node) -> bool:
    """Writes nothing after the messages but a generation prompt."""
    return _is_empty(node) or (
        isinstance(node, nodes.If)
        and isinstance(node.test, nodes.Name)
        and node.test.name == _PROMPT
        and not node.elif_
        and not node.else_
    )
