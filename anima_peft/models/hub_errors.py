"""What a hub's library raises, as one line that may be shown and logged."""

from __future__ import annotations

import json
import os
import re

from huggingface_hub import get_token
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # HTTPError: that of httpx or its successor

HUGGING_FACE_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # RuntimeError: hf_xet's
"""What Hugging Face's library is known to raise where a hub does not serve."""
_LONGEST_CAUSE = 400  # characters of a library's message
_PASSWORD = re.compile(r"(https?://)[^/@\s]+@")  # of a mirror, in its address


def cause(error: BaseException, given_token: object = None) -> str:
    """A library's error in one line, without the user's tokens and passwords, which a server may echo.

    Args:
        error: what it raised.
        given_token: a token beside those that the environment holds.
    """
    if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__  # these wrap what happened in words that say less
    if isinstance(error, json.JSONDecodeError):
        return "the hub answered with something else than JSON, such as the page of a proxy or a login"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for token in (given_token, get_token(), os.environ.get("MODELSCOPE_API_TOKEN")):
        text = text.replace(token, "***") if isinstance(token, str) and token else text
    text = _PASSWORD.sub(r"\1***@", text)
    return text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]} …"
