"""Text in the report: made harmless, shortened, folded."""

import unicodedata
from html import escape

MAX_TEXT = 800
"""Characters shown of one prompt or completion: three quarters from its start, the rest from its end."""
FOLDED_TEXT = 240
"""Longer texts show so many characters until they are unfolded."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
PLAIN = "\n\t\u200c\u200d"
"""Control characters that stay as they are; Persian and emoji need the last two."""
UNKNOWN = '<span class="muted">not known</span>'


def visible(text: str) -> str:
    """Text for HTML: escaped, and with no character that hides itself or reorders others."""
    return escape(unhidden(text))


def unhidden(text: str) -> str:
    """The text with every character shown that would hide itself or reorder others; not escaped."""
    return "".join(map(_seen, text))


def short(text: str) -> str:
    """Visible text, with its middle left out when it is long."""
    head, middle, tail = text[: MAX_TEXT * 3 // 4], text[MAX_TEXT * 3 // 4 : -MAX_TEXT // 4], text[-MAX_TEXT // 4 :]
    left_out = f'<span class="muted"> [{len(middle):,} characters left out] </span>'
    return visible(text) if len(text) <= MAX_TEXT else visible(head) + left_out + visible(tail)


def folded(text: str) -> str:
    """The same behind its beginning: the rest opens with a click."""
    if len(text) <= FOLDED_TEXT:
        return visible(text)
    head = visible(text[:FOLDED_TEXT])
    return f'<details class="fold"><summary>{head}</summary>{short(text).removeprefix(head)}</details>'


def table_row(label: str, *cells: str) -> str:
    """One row of a table; label and cells are HTML."""
    return f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def known(value: float | None, form: str) -> str:
    """A number, or that there is none."""
    return UNKNOWN if value is None else format(value, form)


def _seen(character: str) -> str:
    code = ord(character)
    if character in PLAIN or unicodedata.category(character) not in HIDDEN:
        return character
    return chr(0x2400 + code) if code < 32 else f"[U+{code:04X}]"
