r"""What a regular expression uses beyond regular languages, and where Rust's reading and Python's part.

Rust's syntax is the automaton's; Python's is that of `re` and of the regex package. The scan follows both
only as far as their parts have the same borders: escapes, classes, groups, comments of the verbose mode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["IRREGULAR", "OTHERWISE", "SETS", "Feature", "expanded_size", "features", "for_prefixes"]

IRREGULAR = frozenset(
    ("look-around", "back-reference", "atomic group", "conditional", "recursion", "word boundary", "anchor",
     "possessive quantifier", "branch reset", "control verb")
)  # fmt: skip
"""What an automaton does not hold, or not in the engine's words."""

OTHERWISE = frozenset(("possessive quantifier", "blank in a verbose class"))
"""What Rust silently reads in another sense than Python: the automaton is no engine for it."""

SETS = frozenset(("set operation", "nested set", "POSIX class"))
"""What Rust and the regex package read alike, and `re` as single characters."""

_TOKEN = re.compile(
    r"\\[gkPp](?:<[^>]*>|\{[^}]*\}|'[^']*')|\\[1-9][0-9]*|\\."
    r"|\(\?#[^)]*\)?|\(\?\([^)]*\)|\(\?(?:P[=>&]|&)[^()]*|\(\?[=!>]|\(\?<[=!]|\(\?P?<[^>]*>|\(\?[RrPp+-]?[0-9A-Z]*\)"
    r"|\(\?[A-Za-z-]+[:)]|\(\?.|\(\*[A-Z]+\)|\{[0-9]*,?[0-9]*\}|.",
    re.DOTALL,
)
_CLASS = re.compile(r"\[:\^?[a-z]+:\]|\\.|&&|--|~~|\|\||.", re.DOTALL)


_NEVER = "(?:(?!)"
_BOUNDARIES = {
    r"\b": r"(?:(?<=\w)(?!\w)|(?<=\A|\W)(?=\w))",
    r"\B": r"(?:(?<=\w)(?=\w)|(?<=\A|\W)(?!\w))",
}


class Feature(NamedTuple):
    """Something that engines read differently or not at all: what, where (from 0), and its text."""

    kind: str
    position: int
    text: str


def features(pattern: str) -> list[Feature]:
    """Find what is special in a pattern, in its order."""
    found: list[Feature] = []
    quantified = False
    for at, token, inside in _walk(pattern):
        if token == "[":
            found += inside
            quantified = False
            continue
        kind = _kind(token, at, pattern)
        if token == "+" and quantified:
            kind = "possessive quantifier"
        if kind:
            found.append(Feature(kind, at, token))
        quantifier = token in ("*", "+", "?") or (len(token) > 2 and token[0] == "{")
        quantified = quantifier and not quantified
    return found


def for_prefixes(pattern: str) -> tuple[str, ...]:
    r"""Return patterns of which every prefix of a match has to be a partial match, by the regex package.

    It sees a partial match where the end of the text is met. But it takes `\b` at the end for what it is
    there and then, and can miss a prefix before look-behind; so the first is spelt as look-ahead, and the
    second left out. So is a `$` that look-ahead or a condition asks for: it holds at the end of every prefix,
    and `(?!a$)` would forbid the prefix "a" of "ab". And where look-ahead meets the end, it looks no further,
    so that `(?!.*x)a` would let any text begin: besides the pattern there is then one without look-ahead.

    Returns:
        None at all where a pattern reads backwards, or has boundaries that cannot be spelt so.
    """
    if _is_beyond_prefixes(pattern):
        return ()
    wider = _without_lookaround(pattern)
    found = features(pattern)
    looks = {"look-around", "conditional"} & {feature.kind for feature in found}
    ends = any(
        token in ("$", r"\Z", r"\z") and at + len(token) < len(pattern) for at, token, _ in _walk(pattern)
    )
    if (looks and ends) or any(feature.text in ("(?<=", "(?<!") for feature in found):
        return (wider,) if wider else ()
    spelt, end = [], 0
    for at, token, _ in _walk(pattern):
        spelt += [pattern[end:at], _BOUNDARIES.get(token, token)]
        end = at + len(token)
    exact = "".join([*spelt, pattern[end:]])
    return (exact, wider) if wider else (exact,)


def expanded_size(pattern: str) -> int:
    """Return how many parts a pattern has when what it repeats at least so often is written out."""
    sizes, last = [0], 0  # of the open groups, the pattern itself the first; of the last part
    for _, token, _ in _walk(pattern):
        least = re.fullmatch(r"\{([0-9]+)(?:,[0-9]*)?\}", token)
        if token.startswith("(") and not token.endswith(")"):
            sizes.append(0)
            last = 0
            continue
        if least:
            more = last * (int(least[1]) - 1) if int(least[1]) else 0
            last += more
        elif token == ")" and len(sizes) > 1:
            last = more = sizes.pop()
        else:
            last = more = 1
        sizes[-1] += more
    return sum(sizes)


def _is_beyond_prefixes(pattern: str) -> bool:
    r"""Whether a pattern has `\m`, `\M`, `\G` or `\K`, or the flag `r` (backwards) or `w` (other words)."""
    for _, token, _ in _walk(pattern):
        flags = re.fullmatch(r"\(\?([A-Za-z]+)[-A-Za-z]*[:)]", token)
        if token[:2] in (r"\m", r"\M", r"\G", r"\K") or (flags and set("rw") & set(flags[1])):
            return True
    return False


def _without_lookaround(pattern: str) -> str:
    """Return a pattern that matches more: the same, but what it asks of the text around is not asked.

    Every way to match the pattern is one to match the wider one, since the matcher tries all. That does not
    hold where it is bound to its first way: atomic groups, look-around with groups that are asked for later.
    Groups keep their numbers.

    Returns:
        The wider pattern; "" where there is nothing to leave out, or the above is in the way.
    """
    found = features(pattern)
    kinds, texts = {feature.kind for feature in found}, {feature.text for feature in found}
    if kinds & (IRREGULAR - {"look-around", "back-reference", "word boundary", "anchor"}):
        return ""
    if not kinds & {"look-around"} or ("back-reference" in kinds and texts & {"(?=", "(?<="}):
        return ""
    parts, opened, end = [], [], 0
    for at, token, _ in _walk(pattern):
        parts.append(pattern[end:at])
        end = at + len(token)
        if token in ("(?!", "(?=", "(?<!", "(?<="):
            token = _NEVER  # with the ? at its end it may be left out
        if token == _NEVER or (token.startswith("(") and not token.endswith(")")):
            opened.append(token)
        elif token == ")" and opened and opened.pop() == _NEVER:
            token = ")?"
        elif token in (r"\b", r"\B"):
            token = "(?:)"
        parts.append(token)
    return "" if opened else "".join([*parts, pattern[end:]])


def _walk(pattern: str) -> Iterator[tuple[int, str, list[Feature]]]:
    """Yield where each part begins, and the part; for a class its bracket, and what is special inside."""
    verbose = [False]  # in each open group, the pattern itself the first
    at = 0
    while at < len(pattern):
        token = _match(_TOKEN, pattern, at)
        if verbose[-1] and token == "#":
            at = (pattern.find("\n", at) + 1) or len(pattern)
        elif token == "[":
            inside, end = _class(pattern, at, verbose[-1])
            yield at, token, inside
            at = end
        else:
            yield at, token, []
            _groups(verbose, token)
            at += len(token)


def _groups(verbose: list[bool], token: str) -> None:
    """Follow the verbose mode through groups."""
    flags = re.fullmatch(r"\(\?([A-Za-z-]+)([:)])", token)
    if flags and not re.fullmatch(r"\(\?[RrPp]\)", token):
        on, _, off = flags[1].partition("-")
        after = "x" in on or (verbose[-1] and "x" not in off)
        if flags[2] == ")":
            verbose[-1] = after
        else:
            verbose.append(after)
    elif token.startswith("(?(") or (token.startswith("(") and not token.endswith(")")):
        verbose.append(verbose[-1])
    elif token == ")" and len(verbose) > 1:
        verbose.pop()


def _kind(token: str, at: int, pattern: str) -> str:
    """Name what a token outside of classes does; "" where all engines agree."""
    if token.startswith("\\"):
        if token[1:2] in ("b", "B", "<", ">", "m", "M", "X", "K"):
            return "word boundary" if token[1] in "bB" else ""
        if token[1:2] in ("A", "Z", "G"):
            return "anchor"
        if (token[1:2].isdigit() and token[1] != "0") or token[1:2] in ("g", "k"):
            return "back-reference"
        return ""
    if token in ("^", "$"):
        outer = at == 0 if token == "^" else at == len(pattern) - 1
        return "" if outer else "anchor"
    if token.startswith("(*"):
        return "control verb"
    if not token.startswith("(?"):
        return ""
    rest = token[2:]
    for starts, kind in (
        (("=", "!", "<=", "<!"), "look-around"),
        ((">",), "atomic group"),
        (("(",), "conditional"),
        (("|",), "branch reset"),
        (("P=",), "back-reference"),
        (("R)", "&", "P>", "P&"), "recursion"),
    ):
        if rest.startswith(starts):
            return kind
    return "recursion" if re.fullmatch(r"[+-]?[0-9]+\)", rest) else ""


def _class(pattern: str, start: int, verbose: bool) -> tuple[list[Feature], int]:
    """Scan a class from its bracket; return what is special inside, and where it ends in Rust's reading."""
    found: list[Feature] = []
    at = start + 1 + pattern.startswith("^", start + 1)
    at += pattern.startswith("]", at)  # the first one is a character
    depth = 1
    while at < len(pattern) and depth:
        token = _match(_CLASS, pattern, at)
        if token.startswith("[:"):
            found.append(Feature("POSIX class", at, token))
        elif token in ("&&", "--", "~~"):
            found.append(Feature("set operation", at, token))
        elif token == "[":
            found.append(Feature("nested set", at, token))
            depth += 1
            inner = at + 1 + pattern.startswith("^", at + 1)
            at = inner + pattern.startswith("]", inner) - 1
        elif token == "]":
            depth -= 1
        elif verbose and token.isspace():
            found.append(Feature("blank in a verbose class", at, token))
        at += len(token)
    return found, at


def _match(tokens: re.Pattern[str], pattern: str, at: int) -> str:
    match = tokens.match(pattern, at)
    assert match is not None  # the last alternative takes any character
    return match[0]
