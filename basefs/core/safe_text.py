"""Texts of libraries and services, made fit for records and people. No secret gets through."""

import re

from oslo_utils import strutils

_TEXT_CHARS_MAX = 300
_USER_IN_URL = re.compile(r"//[^/@\s]+@")
_QUERY = re.compile(r"\?[^\s'\")]*")
_SPACE = re.compile(r"\s+")


def safe_text(text: str) -> str:
    """`text` for people, in one line of at most 300 characters, without passwords, tokens and users of URLs."""
    masked = _USER_IN_URL.sub("//***@", strutils.mask_password(_QUERY.sub("", text)))
    return _SPACE.sub(" ", masked).strip()[:_TEXT_CHARS_MAX]
