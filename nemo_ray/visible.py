"""Text from rows, made safe to print: it can show anything, and control nothing."""

import unicodedata

_KEPT = "\n\t"
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that have no shape of their own: controls, formats (bidirectional marks), surrogates."""
_JOINERS = "\u200c\u200d"
"""Formats that scripts and emoji are written with."""


def visible(text: str) -> str:
    """The text with control characters shown (as ␛, or as \\u202e); newlines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in _KEPT or character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
