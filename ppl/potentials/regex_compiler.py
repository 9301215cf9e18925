"""Regular expression to byte automaton, by outlines-core; also a script that `ponder.potentials.regex` runs.

Only the standard library is imported besides the engine, so that the child starts in a twentieth of a second.
"""

from __future__ import annotations

import array
import json
import re
import sys

__all__ = ["ADVICE", "MEMORY_LIMIT", "STATE_LIMIT", "check_wrappable", "compile_pattern", "without_anchors"]

STATE_LIMIT = 2**16
"""Most states of a byte automaton: its table then takes 64 MiB."""

MEMORY_LIMIT = 2**31
"""Address space of the child in bytes, where the system can limit it."""

ADVICE = (
    "lower the bounds of its repetitions, nest fewer, use ASCII classes such as [a-z] for \\w, or repeat a "
    "class that leaves out some character, such as [^\\n], rather than one of all characters"
)

_END_OF_TEXT = 256


def compile_pattern(pattern: str) -> tuple[array.array, int, list[int]]:
    r"""Compile a pattern: the table int32[S * 256], the initial and the accepting states.

    The engine is given single bytes for a vocabulary and a wrapped pattern. As it stands, `a(bc)?` would
    refuse "abc", `é+` "éé" and `a|ab` "ab": the engine drops a prefix of a match once a shorter text has
    matched. An end anchor cures that. The engine refuses an anchored pattern that can be empty, hence a start
    byte, which is consumed here. What the wrapping would hide is refused first: `a)(b`, or a start anchor.

    Raises:
        ValueError: the engine refuses the pattern, or the automaton has too many states.
    """
    from outlines_core import Index, Vocabulary

    vocabulary = Vocabulary(_END_OF_TEXT, {bytes([byte]): [byte] for byte in range(256)})
    bare = without_anchors(pattern)
    start_byte = _start_byte(bare)
    try:
        # In verbose mode a comment at the end would swallow the bracket; the line break is nothing there.
        end = "\n" if check_wrappable(bare) else ""
        index = Index(rf"\x{start_byte:02x}(?:{bare}{end})\z", vocabulary)
    except ValueError as error:
        raise ValueError(
            f"the engine refuses the pattern: {error} (look-around, back-references, \\b and inner anchors "
            "are not supported, nor are parentheses nested more than about 200 deep; the pattern always has "
            "to match the whole text)"
        ) from error
    transitions = index.get_transitions()
    number: dict[int, int] = {}
    for state, row in transitions.items():
        row.pop(_END_OF_TEXT, None)
        for name in (state, *row.values()):
            number.setdefault(name, len(number))
    if len(number) > STATE_LIMIT:
        raise ValueError(
            f"the automaton has {len(number)} states, above the limit of {STATE_LIMIT}; {ADVICE}"
        )
    start = transitions.get(index.get_initial_state(), {})
    if start_byte not in start:  # nothing matches, as with [^\s\S]: one state that is not final
        return array.array("i", [-1]) * 256, 0, []
    table = array.array("i", [-1]) * (256 * len(number))
    for state, row in transitions.items():
        offset = 256 * number[state]
        for byte, target in row.items():
            table[offset + byte] = number[target]
    finals = [number[state] for state in index.get_final_states() if state in number]
    return table, number[start[start_byte]], finals


def without_anchors(pattern: str) -> str:
    """Drop a leading ^ and a trailing $: a full match implies them, and the engine refuses the first."""
    pattern = pattern.removeprefix("^")
    body = pattern.removesuffix("$")
    escapes = len(body) - len(body.rstrip("\\"))
    return pattern if escapes % 2 else body


def _start_byte(pattern: str) -> int:
    """Choose a start byte that few parts of the pattern match.

    The engine also follows matches that begin at a later start byte, which can make `[^"]{0,30}` exponential
    unless that is the quote. Every choice is right, so Python's reading of the parts is good enough; but word
    boundaries look at the byte before, which then must not be a letter.
    """
    if re.search(r"\\[bB<>]", pattern):
        return ord("\n")
    parts = dict.fromkeys(re.findall(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|\.", pattern, re.DOTALL))
    negated = [part for part in parts if part.startswith("[^")]
    left_out = "".join(part[2:-1] for part in negated)
    candidates = "\n\0" + "0a" + "".join(c for c in dict.fromkeys(left_out) if c.isascii())[:8]
    weight = {part: 1 if part.startswith("[") and part not in negated else len(parts) for part in parts}
    return ord(min(candidates, key=lambda c: sum(weight[part] for part in parts if _may_match(part, c))))


def _may_match(part: str, character: str) -> bool:
    if any(mark in part[1:] for mark in ("[", "&&", "||", "--", "~~")):
        return True  # set operations, which Python reads otherwise
    try:
        return re.fullmatch(part, character) is not None
    except re.error:
        return True


def check_wrappable(pattern: str) -> bool:
    """Refuse start anchors, and parentheses that close what the pattern did not open.

    Returns:
        Whether the end of the pattern is in verbose mode, `(?x)`.
    """
    verbose = [False]  # in each open group, the pattern itself the first
    in_class, in_comment = 0, False
    for part in re.findall(r"\\.|\[\^?\]?|\(\?[A-Za-z-]+[:)]|.", pattern, re.DOTALL):
        if in_comment:
            in_comment = "\n" not in part
        elif part == "#" and verbose[-1]:
            in_comment = True
        elif part.startswith("["):
            in_class += 1
        elif in_class:
            in_class -= part == "]"
        elif part in ("^", r"\A"):
            raise ValueError(f"start anchor {part} inside the pattern")
        elif part.startswith("(?"):  # flags: for a group, or from here to the end of this one
            on, _, off = part[2:-1].partition("-")
            after = "x" in on or (verbose[-1] and "x" not in off)
            if part.endswith(")"):
                verbose.pop()
            verbose.append(after)
        elif part == "(":
            verbose.append(verbose[-1])
        elif part == ")":
            verbose.pop()
            if not verbose:
                raise ValueError("unopened group")
    return verbose[-1]


def _limit_resources(seconds: int) -> None:
    """Bound what this process may take; a parent that was killed cannot stop it any more."""
    try:
        import resource
    except ImportError:  # not a Unix system: the parent's clock is the bound
        return
    for kind, wanted in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CPU, seconds)):
        _, hard = resource.getrlimit(kind)
        try:
            resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
        except (OSError, ValueError):  # systems that know the limit and refuse to set it
            continue


def _main() -> None:
    """Read a pattern from stdin; write a line of JSON, `{"error": …}` or the states, then the table."""
    _limit_resources(int(sys.argv[1]))
    pattern = sys.stdin.buffer.read().decode()
    try:
        table, initial, finals = compile_pattern(pattern)
    except ValueError as error:
        sys.stdout.buffer.write(json.dumps({"error": str(error)}).encode())
        return
    header = json.dumps({"initial": initial, "finals": finals})
    sys.stdout.buffer.write(header.encode() + b"\n")
    sys.stdout.buffer.write(table)


if __name__ == "__main__":
    _main()
