"""Regular expressions: the potential `regex`, and compiling patterns within bounds of time and memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

from ponder.arguments import NAME_WIDTH, shorten
from ponder.automata.automaton import AutomatonError
from ponder.potentials import regex_compiler
from ponder.potentials.automaton_potential import ByteAutomaton
from ponder.potentials.engines import EngineChoice, check_engine
from ponder.potentials.hosted_pattern import HostedPattern
from ponder.potentials.pattern_matching import MOST_PARTS, fault
from ponder.potentials.pattern_syntax import IRREGULAR, OTHERWISE, SETS, Feature, expanded_size, features
from ponder.potentials.regex_compiler import ADVICE, MEMORY_LIMIT, compile_pattern

__all__ = ["COMPILE_SECONDS", "PATTERN_LIMIT", "SHORT_PATTERN", "Pattern", "compile_bounded", "regex"]

COMPILE_SECONDS = 20
"""Longest compilation of a pattern. Ordinary ones take milliseconds; `\\w{200}` takes ten seconds."""

PATTERN_LIMIT = 2**18
"""Longest pattern in characters: 5000 alternatives of 15 letters are 75 thousand."""

SHORT_PATTERN = 16
"""Patterns up to this length, without counted repetitions, are compiled without the detour of a child.

They have too few places for an automaton above 2^16 states; the worst that we found take 1.5 seconds.
"""


def regex(pattern: str, engine: str = "auto") -> EngineChoice:
    r"""Constrain the generated text to match a regular expression from its first character to its last.

    Φ of a finished trace is 1 if the text before EOS matches in full, else 0. It is exact on every engine;
    they differ in what Φ of a prefix knows, which only steers:

    - the automaton, inside jit: Φ of a prefix is 1 if some continuation within the tokens that remain
      matches, else 0: dead ends and the length limit are exact, at the level of tokens. The pattern is
      compiled when a program is built, within `COMPILE_SECONDS` and 2^16 states of a byte automaton.
    - the host, where a pattern is regular: llguidance says which tokens can follow, one call a step.
    - the host, for look-around, back-references, atomic groups, possessive quantifiers, conditionals,
      recursion, word boundaries and anchors inside: the regex package tells from its partial matches whether
      a prefix can still become a match, and so which tokens can follow. Where very many can, the mask is too
      wide, and a particle may die a token later.

    The first two read the syntax of Rust's regex crate, the third that of Python's `re` with the additions of
    the regex package. Where Rust reads something in another sense than Python, the pattern is left to the
    third (possessive quantifiers; blanks in the classes of verbose patterns), or taken as Rust and the regex
    package do, with a warning: set operations, sets in sets and POSIX classes. `\w`, `\d` and `\s` are
    Unicode. Anchors at both ends are not needed. Special tokens that have no text are never allowed, except
    EOS. The repr of the bound potential says which engine is in use and what is judged
    `late`, by matches alone.

    Args:
        pattern: the regular expression.
        engine: "automaton", "host", or "auto": the automaton where it holds the pattern and its tables fit,
            else the host.

    Raises:
        TypeError: the pattern is no string.
        ValueError: the pattern is empty, longer than `PATTERN_LIMIT` characters, or no valid Unicode; when a
            program is built, also: it is no pattern (the message names the place and the cause),
            engine="automaton" cannot hold it, or nothing matches within the length limit.

    Example:
        >>> import ponder
        >>> date = ponder.regex(r"\d{4}-\d{2}-\d{2}")
        >>> twice = ponder.regex(r"(\w+) \1")
    """
    if not isinstance(pattern, str):
        raise TypeError(f"regex(pattern): expected a str, got {type(pattern).__name__}")
    check_engine("regex", engine)
    if not pattern:
        raise ValueError("regex(pattern): expected a pattern, got an empty string")
    if len(pattern) > PATTERN_LIMIT:
        raise ValueError(
            f"regex(pattern): expected at most {PATTERN_LIMIT} characters, got {len(pattern)}; for a long "
            "list of texts use ponder.choice"
        )
    try:
        pattern.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"regex(pattern): expected Unicode text, got lone surrogates: {error}") from error
    otherwise = _otherwise(pattern)
    if otherwise and engine == "automaton":
        raise AutomatonError(
            f"regex(pattern): a {otherwise.kind} at position {otherwise.position} ({otherwise.text!r}) means "
            "something else in the automaton's syntax than in Python's; use engine='auto'"
        )
    language = None if otherwise or engine == "host" else Pattern(pattern)
    return EngineChoice(language, HostedPattern(pattern), engine)


def _otherwise(pattern: str) -> Feature | None:
    """Return what the engines read in different senses; warn of what `re` alone reads otherwise."""
    found = features(pattern)
    for feature in found:
        if feature.kind in SETS:
            warnings.warn(
                f"regex(pattern): {feature.text!r} at position {feature.position} is read as a "
                f"{feature.kind}; Python's re reads single characters there: escape them if they are meant",
                stacklevel=3,
            )
            break
    return next((feature for feature in found if feature.kind in OTHERWISE), None)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The texts that match a regular expression in full."""

    pattern: str

    def byte_automaton(self) -> ByteAutomaton:
        """See `Language`."""
        return compile_bounded(self.pattern, repr(self))

    def __repr__(self) -> str:
        return f"regex({shorten(repr(self.pattern), NAME_WIDTH)})"


def compile_bounded(pattern: str, name: str) -> ByteAutomaton:
    """Compile a pattern to an automaton over bytes, within bounds.

    The engine is native code, which nothing in this process can interrupt, and some patterns of twenty
    characters take it hours or all memory. So it works in a child process that can be ended.

    Args:
        pattern: the regular expression.
        name: what needs it, for the error messages.

    Raises:
        ImportError: the engine is not installed.
        AutomatonError: the engine refuses the pattern, or a limit is exceeded.
    """
    try:
        import outlines_core  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{name} needs outlines-core: pip install 'ponder-ppl[grammar]'") from error
    try:
        if len(pattern) <= SHORT_PATTERN and "{" not in pattern:
            table, initial, finals = compile_pattern(pattern)
        else:
            table, initial, finals = _compile_in_child(pattern)
    except ValueError as error:
        raise AutomatonError(f"{name}: {_cause(pattern)}{error}") from error
    return ByteAutomaton(np.frombuffer(table, np.int32).reshape(-1, 256), initial, finals)


def _cause(pattern: str) -> str:
    """Name what an automaton cannot hold or what is wrong, and where; "" where nothing is known."""
    for feature in features(pattern):
        if feature.kind in IRREGULAR:
            return f"{feature.kind} at position {feature.position} ({feature.text!r}): "
    if expanded_size(pattern) > MOST_PARTS:
        return ""  # the limit that was met says it
    try:
        problem = fault(pattern)
    except ImportError:
        return ""
    return f"{problem}: " if problem else ""


def _compile_in_child(pattern: str) -> tuple[bytes, int, list[int]]:
    # A new interpreter and no fork: JAX has threads, which a fork would leave with locks held.
    command = [sys.executable, "-P", str(Path(regex_compiler.__file__)), str(COMPILE_SECONDS + 1)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        child = subprocess.run(
            command,
            input=pattern.encode(),
            capture_output=True,
            timeout=COMPILE_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"compiling the pattern takes more than the limit of {COMPILE_SECONDS} seconds; {ADVICE}"
        ) from None
    header, _, table = child.stdout.partition(b"\n")
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(
            f"the engine failed on the pattern ({', '.join([f'exit code {child.returncode}', *last])}), "
            f"probably for want of memory (limit {MEMORY_LIMIT >> 20} MiB) or stack; {ADVICE}"
        )
    answer = json.loads(header)
    if "error" in answer:
        raise ValueError(answer["error"])
    return table, answer["initial"], answer["finals"]
