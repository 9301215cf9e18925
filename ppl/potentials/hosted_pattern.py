"""Regular expressions on the host: llguidance where a pattern is regular, else the regex package."""

from __future__ import annotations

import dataclasses
import re

from ponder.arguments import NAME_WIDTH, shorten
from ponder.potentials.combining import Unbound
from ponder.potentials.engines import with_engine
from ponder.potentials.grammar_matching import Matchers, engine_refuses
from ponder.potentials.hosted import HostedPotential, bind_matchers, text_pieces
from ponder.potentials.pattern_matching import PatternMatchers, fault
from ponder.potentials.pattern_syntax import IRREGULAR, OTHERWISE, features
from ponder.potentials.regex_compiler import check_wrappable, without_anchors
from ponder.protocols import Context

__all__ = ["HostedPattern"]


@dataclasses.dataclass(frozen=True)
class HostedPattern:
    """The texts that match a regular expression in full."""

    pattern: str

    def bind(self, unbound: Unbound, context: Context) -> HostedPotential:
        """See `HostLanguage`.

        Raises:
            ImportError: llguidance or the regex package is not installed.
            ValueError: the pattern is none, the model has no tokenizer, or no match can begin.
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
        shown = with_engine(repr(unbound), "host", judge="regex", late=late)
        return bind_matchers(unbound, PatternMatchers.compile(self.pattern, pieces), context, shown)

    def __repr__(self) -> str:
        return f"regex({shorten(repr(self.pattern), NAME_WIDTH)})"


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
