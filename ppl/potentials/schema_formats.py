"""What the keyword `format` asks of a string.

The specification lets an implementation choose; here the formats of this table are asserted and all others
say nothing. Only the standard library judges.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import ipaddress
import json
import re
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from ponder.potentials.ecma_pattern import search_pattern

__all__ = ["FORMATS", "GUIDED", "GUIDE_PATTERNS"]

_TIME = re.compile(
    r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?(?:[zZ]|[+-](?:[01]\d|2[0-3]):[0-5]\d)", re.ASCII
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_DURATION = re.compile(
    r"P(?!$)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=\d)(?:\d+H)?(?:\d+M)?(?:\d+(?:\.\d+)?S)?)?)", re.ASCII
)
_EMAIL = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
                   r"(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")  # fmt: skip
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?:[!#$&-;=?-\[\]_a-z~]|%[0-9A-Fa-f]{2})*")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def _matches(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


def _reads(parse: Callable[[str], object]) -> Callable[[str], bool]:
    """A format of what a parser takes."""

    def check(text: str) -> bool:
        try:
            parse(text)
        except (ValueError, binascii.Error, RecursionError):
            return False
        return True

    return check


def _is_date(text: str) -> bool:
    return _DATE.fullmatch(text) is not None and _reads(datetime.date.fromisoformat)(text)


def _is_date_time(text: str) -> bool:
    return text[10:11] in ("T", "t") and _is_date(text[:10]) and _TIME.fullmatch(text[11:]) is not None


def _is_uri(text: str) -> bool:
    return _URI.fullmatch(text) is not None and _reads(urlsplit)(text)


def _is_version(version: int) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        return _UUID.fullmatch(text) is not None and uuid.UUID(text).version == version

    return check


FORMATS: dict[str, Callable[[str], bool]] = {
    "date": _is_date,
    "time": _matches(_TIME),
    "date-time": _is_date_time,
    "duration": _matches(_DURATION),
    "email": _matches(_EMAIL),
    "hostname": _matches(_HOST),
    "ipv4": _reads(ipaddress.IPv4Address),
    "ipv6": _reads(ipaddress.IPv6Address),
    "uri": _is_uri,
    "uuid": _matches(_UUID),
    "regex": _reads(search_pattern),
    **{f"uuid{version}": _is_version(version) for version in range(1, 9)},
    # Those of pydantic.
    "ipv4network": _reads(ipaddress.IPv4Network),
    "ipv6network": _reads(ipaddress.IPv6Network),
    "ipv4interface": _reads(ipaddress.IPv4Interface),
    "ipv6interface": _reads(ipaddress.IPv6Interface),
    "ipvanyaddress": _reads(ipaddress.ip_address),
    "ipvanynetwork": _reads(ipaddress.ip_network),
    "ipvanyinterface": _reads(ipaddress.ip_interface),
    "json-string": _reads(json.loads),
    **dict.fromkeys(("binary", "directory-path", "file-path", "password", "path"), lambda text: True),
    "base64": _reads(lambda text: base64.b64decode(text, validate=True)),
}
"""Whether a string is of a format."""

GUIDED = frozenset("date time date-time duration email hostname ipv4 ipv6 uri uuid".split())
"""Formats that the engine knows by name."""

_HEX = "[0-9a-fA-F]"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"

GUIDE_PATTERNS = {
    **{
        f"uuid{v}": f"{_HEX}{{8}}-{_HEX}{{4}}-{v}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}"
        for v in range(1, 9)
    },
    "ipv4network": rf"{_IPV4}(?:/(?:3[0-2]|[12]?[0-9]))?",
    "ipv4interface": rf"{_IPV4}(?:/(?:3[0-2]|[12]?[0-9]))?",
    "base64": "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
}
"""Patterns of whole strings that guide towards other formats."""
