"""Text out of others' files, made fit for a terminal."""

from __future__ import annotations

import unicodedata

# Control and format characters (escape sequences, directions of writing, widths of nothing), halves of surrogates,
# and separators of lines. Spaces of other widths stay: names in Chinese and Japanese have them.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def escaped(text: str, keep: str = "") -> str:
    """The text with what a terminal would obey, hide or not be able to show written as `\\x1b` or `\\u202e`.

    Args:
        text: whatever it is.
        keep: characters that stay, such as the line breaks of a message of ours.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char in keep or unicodedata.category(char) not in _UNSAFE else char.encode("unicode_escape").decode()
        for char in text
    )


def cut(text: str, longest: int) -> str:
    """The text, or its start with an ellipsis where it is longer than so many characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
