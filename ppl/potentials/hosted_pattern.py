"""Regular expressions on the host: llguidance where a pattern is regular, else the regex package.

The regex package judges complete texts and, by partial matching, prunes prefixes that no match begins with.
It does not say which tokens can follow, so `Generation(proposal="rejection")` looks for them.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from ponder.arguments import NAME_WIDTH, shorten
from ponder.bases import BasePotential
from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Unbound
from ponder.potentials.engines import with_engine
from ponder.potentials.grammar_matching import Matchers, engine_refuses
from ponder.potentials.hosted import bind_matchers, text_pieces
from ponder.potentials.pattern_syntax import IRREGULAR, OTHERWISE, SETS, features
from ponder.potentials.regex_compiler import check_wrappable, without_anchors
from ponder.potentials.text import Text, TextPotential
from ponder.protocols import Context

__all__ = ["MATCH_SECONDS", "HostedPattern", "PatternJudge", "fault"]

MATCH_SECONDS = 5.0
"""Longest match of one text by the regex package, which goes back and forth: `(x+x+)+y` takes for ever."""

_CUT = "\udfff"  # stands for a character whose last bytes are still to come


@dataclasses.dataclass(frozen=True)
class HostedPattern:
    """The texts that match a regular expression in full."""

    pattern: str

    def bind(self, unbound: Unbound, context: Context) -> BasePotential:
        """See `HostLanguage`.

        Raises:
            ImportError: llguidance or the regex package is not installed.
            ValueError: the pattern is none, or the model has no tokenizer.
        """
        name, found = repr(self), features(self.pattern)
        pieces = text_pieces(context, name)
        if not any(feature.kind in IRREGULAR | OTHERWISE for feature in found):
            grammar = _as_grammar(self.pattern)
            if grammar and not _refusal(grammar, name):
                matchers = Matchers.compile(grammar, pieces, name=name)
                return bind_matchers(unbound, matchers, context, with_engine(repr(unbound), "host"))
        problem = fault(self.pattern)
        if problem:
            raise ValueError(f"{name}: {problem}")
        late = sorted({feature.kind for feature in found if feature.kind in IRREGULAR})
        shown = with_engine(repr(unbound), "host", proposal="rejection", late=late)
        texts = _JudgedTexts(
            PatternJudge(self.pattern, partial=False),
            PatternJudge(self.pattern, partial=True),
            unbound,
            shown,
        )
        eos = tuple(int(token) for token in context.lm.eos_token_ids)
        return TextPotential(texts, _Spelling.of(pieces), eos, context.max_new_tokens)

    def __repr__(self) -> str:
        return f"regex({shorten(repr(self.pattern), NAME_WIDTH)})"


@dataclasses.dataclass(frozen=True)
class PatternJudge:
    """Tells which texts match a pattern: in full, or (`partial`) up to where they end so far."""

    pattern: str
    partial: bool

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        """Judge texts; one with `_CUT` at its end lacks bytes, and others with surrogates are no text.

        Raises:
            RuntimeError: a match takes longer than `MATCH_SECONDS`.
        """
        judged = {text: self._judge(text) for text in dict.fromkeys(texts)}
        return [judged[text] for text in texts]

    def _judge(self, text: str) -> bool:
        whole = text.removesuffix(_CUT)
        if (text != whole and not self.partial) or any(
            "\ud800" <= character <= "\udfff" for character in whole
        ):
            return False
        try:
            match = _compile(self.pattern).fullmatch(whole, partial=self.partial, timeout=MATCH_SECONDS)
        except TimeoutError:
            raise RuntimeError(
                f"{HostedPattern(self.pattern)!r}: matching {shorten(repr(whole), 60)} takes more than "
                f"{MATCH_SECONDS:g} seconds; avoid repetitions of repetitions, such as (x+x+)+"
            ) from None
        return match is not None


@pytree
class _JudgedTexts(Text):
    """Judges of texts that stand for a pattern.

    Attributes:
        description: what `bind` starts from again.
        shown: the repr.
    """

    description: Unbound | None = static(default=None)
    shown: str = static(default="")

    def bind(self, context: Context) -> BasePotential:
        """Bind the pattern to another program."""
        assert self.description is not None
        return self.description.bind(context)

    def __repr__(self) -> str:
        return self.shown


@dataclasses.dataclass(frozen=True)
class _Spelling:
    """Spells tokens as text, exact to the byte; equal where the tokens are.

    Attributes:
        digest: of the pieces.
        pieces: the bytes of each token; empty for those that no text has.
    """

    digest: bytes
    pieces: Sequence[bytes] = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, pieces: Sequence[bytes]) -> _Spelling:
        digest = hashlib.sha256(b"".join(len(piece).to_bytes(4) + piece for piece in pieces)).digest()
        return cls(digest, pieces)

    def __call__(self, tokens: Sequence[int]) -> str:
        """Return the text, with surrogates where it is none (see `PatternJudge`)."""
        spelt = [self.pieces[token] for token in tokens]
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(b"".join(spelt))
        except UnicodeDecodeError:
            return "\ud800"
        if not all(spelt):
            return "\ud800"
        return text + _CUT if decoder.getstate()[0] else text


def fault(pattern: str) -> str:
    """Say what is wrong with a pattern for the regex package, and where; "" if nothing is.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        _compile(pattern)
    except (RecursionError, OverflowError, MemoryError):
        return "it is nested too deeply, or repeats too often"
    except ValueError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=256)
def _compile(pattern: str) -> Any:
    """Compile a pattern for the regex package: in Python's sense, but for sets within sets."""
    try:
        import regex
    except ImportError as error:
        raise ImportError(
            f"{HostedPattern(pattern)!r} needs the regex package: pip install 'ponder-ppl[grammar]'"
        ) from error
    sets = any(feature.kind in SETS for feature in features(pattern))
    try:
        return regex.compile(pattern, regex.V1 if sets else regex.V0)
    except regex.error as error:
        place = "" if error.pos is None else f" at position {error.pos}"
        near = "" if error.pos is None else f" ({shorten(repr(pattern[error.pos : error.pos + 20]), 30)})"
        raise ValueError(f"{error.msg}{place}{near}") from error


def _as_grammar(pattern: str) -> str:
    """Write a pattern as a grammar of llguidance; slashes and line breaks, which delimit it, escaped.

    Returns:
        The grammar, or "" for a pattern that cannot stand there: it has an anchor or a bracket where none may
        be, or it is verbose, when the line break that ends a comment would be a character.
    """
    bare = without_anchors(pattern)
    if re.search(r"\(\?[A-Za-z-]*x", bare):
        return ""
    try:
        check_wrappable(bare)
    except ValueError:
        return ""
    parts, escaped = [], False
    for character in bare:
        if character == "\n":
            parts.append("n" if escaped else r"\n")
        else:
            parts.append(rf"\{character}" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    return f"start: /(?:{''.join(parts)})/\n"


def _refusal(grammar: str, name: str) -> str:
    try:
        return engine_refuses(grammar)
    except ImportError as error:
        raise ImportError(f"{name} needs llguidance: pip install 'ponder-ppl[grammar]'") from error
