r"""The patterns of JSON schemas, which are ECMA's, in the spelling of other engines.

What differs: `\d`, `\w` and `\b` know ASCII only, `$` is the very end, `.` leaves out four line breaks, and a
pattern is searched for, not matched in full. Classes come out as ranges, which Python and Rust read alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["full_match", "search_pattern"]

_TOKEN = re.compile(
    r"\\u\{[0-9A-Fa-f]+\}|\\u[dD][89abAB][0-9A-Fa-f]{2}\\u[dD][c-fC-F][0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}"
    r"|\\x[0-9A-Fa-f]{2}|\\c[A-Za-z]|\\[pP]\{[^}]*\}|\\k<[^>]*>|\\[1-9][0-9]*|\\."
    r"|\(\?<[A-Za-z_][^>]*>|\(\?(?:<?[=!]|:|[a-z-]+[:)])|\{[0-9]+(?:,[0-9]*)?\}|.",
    re.DOTALL,
)
_Range = tuple[int, int]
_DIGIT: list[_Range] = [(48, 57)]
_WORD: list[_Range] = [(48, 57), (65, 90), (95, 95), (97, 122)]
_BREAK: list[_Range] = [(10, 10), (13, 13), (0x2028, 0x2029)]
_SPACE: list[_Range] = [
    (9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
    (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
_SURROGATES: _Range = (0xD800, 0xDFFF)
_CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "0": 0}
_BOUNDARY = "(?:(?<![A-Za-z0-9_])(?=[A-Za-z0-9_])|(?<=[A-Za-z0-9_])(?![A-Za-z0-9_]))"
_NO_BOUNDARY = "(?:(?<![A-Za-z0-9_])(?![A-Za-z0-9_])|(?<=[A-Za-z0-9_])(?=[A-Za-z0-9_]))"


class _Part(NamedTuple):
    """A part of a pattern; kinds: text, open, close, or, start, end, and special, for what is not regular."""

    kind: str
    text: str


def search_pattern(pattern: str) -> str:
    """Spell a pattern for `re.search`.

    Raises:
        ValueError: Python does not read it; the message says where and why.
    """
    text = "".join(part.text for part in _parts(pattern))
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{error} (of {text[:80]!r})") from error
    return text


def full_match(pattern: str, anything: str) -> str | None:
    """Spell a pattern as one that has to match a whole string, for engines of regular languages.

    Args:
        pattern: ECMA's, to be searched for.
        anything: a pattern of what may stand before and after, where no anchor forbids it.

    Returns:
        The pattern; None where that cannot be said so: look-around, back-references, anchors inside.
    """
    parts = _parts(pattern)
    if any(part.kind == "special" for part in parts):
        return None
    alternatives, depth = [[]], 0
    for part in parts:
        depth += (part.kind == "open") - (part.kind == "close")
        if depth < 0:
            raise ValueError("unbalanced parenthesis")
        if part.kind == "or" and not depth:
            alternatives.append([])
        else:
            alternatives[-1].append(part)
    spelt = []
    for whole in alternatives:
        starts = bool(whole) and whole[0].kind == "start"
        ends = len(whole) > starts and whole[-1].kind == "end"
        body = whole[starts : len(whole) - ends]
        if any(part.kind in ("start", "end") for part in body):
            return None
        inner = "".join(part.text for part in body)
        spelt.append(f"{'' if starts else anything}(?:{inner}){'' if ends else anything}")
    return "|".join(spelt)


def _parts(pattern: str) -> list[_Part]:
    parts: list[_Part] = []
    tokens = _TOKEN.findall(pattern)
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token == "[":
            text, at = _class(tokens, at + 1)
            parts.append(_Part("text", text))
            continue
        parts.append(_part(token))
        at += 1
    return parts


def _part(token: str) -> _Part:
    if token in ("^", "$"):
        return _Part("start", "^") if token == "^" else _Part("end", r"\Z")
    if token in ("|", ")"):
        return _Part("or" if token == "|" else "close", token)
    if token.startswith("("):
        named = token.startswith("(?<") and token[3] not in "=!"
        flags = token.endswith(")")
        if token[:3] in ("(?=", "(?!") or token[:4] in ("(?<=", "(?<!") or flags:
            return _Part("special" if not flags else "text", token)
        return _Part("open", f"(?P<{token[3:]}" if named else token)
    if token == ".":
        return _Part("text", _spelt(_BREAK, negated=True))
    if token == "{":
        return _Part("text", r"\{")
    if not token.startswith("\\") or len(token) == 1:
        return _Part("text", token)
    if token in (r"\b", r"\B"):
        return _Part("special", _BOUNDARY if token == r"\b" else _NO_BOUNDARY)
    if token[1] in "AZ":
        return _Part("special", token)  # Python's anchors, which pydantic's users write
    if token[1] in "123456789":
        return _Part("special", token)
    if token.startswith(r"\k<"):
        return _Part("special", f"(?P={token[3:-1]})")
    ranges = _escaped(token)
    alone = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return _Part("text", _character(ranges[0][0]) if alone else _spelt(ranges))


def _class(tokens: list[str], at: int) -> tuple[str, int]:
    """Read a class after its bracket: the same in ranges, and where it ends."""
    negated = tokens[at : at + 1] == ["^"]
    at += negated
    ranges: list[_Range] = []
    while at < len(tokens) and tokens[at] != "]":
        low, at = _member(tokens, at)
        single = len(low) == 1 and low[0][0] == low[0][1]
        if single and tokens[at : at + 1] == ["-"] and tokens[at + 1 : at + 2] not in ([], ["]"]):
            high, after = _member(tokens, at + 1)
            if len(high) == 1 and high[0][0] == high[0][1]:
                if high[0][0] < low[0][0]:
                    raise ValueError(f"bad character range {chr(low[0][0])}-{chr(high[0][0])}")
                ranges.append((low[0][0], high[0][0]))
                at = after
                continue
        ranges += low
    if at >= len(tokens):
        raise ValueError("missing ], unterminated class")
    return _spelt(ranges, negated), at + 1


def _member(tokens: list[str], at: int) -> tuple[list[_Range], int]:
    token = tokens[at]
    if token == r"\b":
        return [(8, 8)], at + 1
    if token.startswith("\\") and len(token) > 1:
        return _escaped(token), at + 1
    # Outside a class several characters can be one token, such as "(?:" or "{2}".
    tokens[at : at + 1] = list(token)
    return [(ord(token[0]), ord(token[0]))], at + 1


def _escaped(token: str) -> list[_Range]:
    """What an escape that is no assertion stands for."""
    name, rest = token[1], token[2:]
    sets = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
    if name in "dws":
        return sets[name]
    if name in "DWS":
        return _complement(sets[name.lower()])
    if name in "pP" and rest:
        ranges = list(_property(rest[1:-1]))
        return _complement(ranges) if name == "P" else ranges
    if name == "u" and rest.startswith("{"):
        code = int(rest[1:-1], 16)
    elif name == "u" and len(rest) == 10:
        code = 0x10000 + ((int(rest[:4], 16) & 0x3FF) << 10) + (int(rest[6:], 16) & 0x3FF)
    elif name in "ux" and rest:
        code = int(rest, 16)
    elif name == "c" and rest:
        code = ord(rest) % 32
    else:
        code = _CONTROLS.get(name, ord(name))
    return [(code, code)]


@functools.lru_cache(maxsize=256)
def _property(name: str) -> tuple[_Range, ...]:
    r"""Code points of `\p{name}`, as the regex package knows them."""
    try:
        import regex
    except ImportError as error:
        raise ImportError(
            rf"\p{{{name}}} in a schema needs regex: pip install 'ponder-ppl[grammar]'"
        ) from error
    try:
        matcher = regex.compile(rf"\p{{{name}}}+")
    except regex.error as error:
        raise ValueError(rf"\p{{{name}}}: {error}") from error
    everything = "".join(map(chr, [*range(_SURROGATES[0]), *range(_SURROGATES[1] + 1, 0x110000)]))
    spans = (match.group() for match in matcher.finditer(everything))
    return tuple((ord(span[0]), ord(span[-1])) for span in spans)


def _merged(ranges: Iterable[_Range]) -> list[_Range]:
    merged: list[_Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _complement(ranges: Iterable[_Range]) -> list[_Range]:
    found, low = [], 0
    for start, end in _merged([*ranges, _SURROGATES]):
        if low < start:
            found.append((low, start - 1))
        low = end + 1
    return [*found, (low, 0x10FFFF)] if low <= 0x10FFFF else found


def _spelt(ranges: list[_Range], negated: bool = False) -> str:
    """Write a class; surrogates, which are no characters, are left out."""
    if not ranges:
        return r"[\x00-\U0010ffff]" if negated else r"[^\x00-\U0010ffff]"
    whole = _complement(_complement(ranges))
    members = (
        _character(low) if low == high else f"{_character(low)}-{_character(high)}" for low, high in whole
    )
    return f"[{'^' * negated}{''.join(members)}]"


def _character(code: int) -> str:
    if code < 128:
        character = chr(code)
        return character if character.isalnum() or character in "_ " else f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
