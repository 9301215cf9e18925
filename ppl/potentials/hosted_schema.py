"""JSON schemas on the host: llguidance guides the tokens, jsonschema judges the complete text."""

from __future__ import annotations

import dataclasses
import functools
import json

from ponder.arguments import NAME_WIDTH, shorten
from ponder.potentials.combining import Unbound
from ponder.potentials.engines import with_engine
from ponder.potentials.grammar_matching import Matchers, engine_refuses
from ponder.potentials.hosted import HostedPotential, bind_matchers, text_pieces
from ponder.potentials.schema_guide import Guide, as_grammar, guides
from ponder.potentials.schema_judge import SchemaJudge
from ponder.protocols import Context

__all__ = ["HostedSchema"]


@dataclasses.dataclass(frozen=True)
class HostedSchema:
    """The JSON texts that follow a schema.

    Attributes:
        schema: as JSON text.
        whitespace: a regular expression for what may stand between the parts.
    """

    schema: str
    whitespace: str

    def check(self) -> list[str]:
        """Return the keywords that say nothing; raise what `SchemaJudge.of` raises."""
        _judge(self.schema)
        guide = next(guides(json.loads(self.schema), lambda part: True))
        return [keyword for keyword in guide.unknown if not keyword.startswith("format ")]

    def bind(self, unbound: Unbound, context: Context) -> HostedPotential:
        """See `HostLanguage`.

        Raises:
            ImportError: llguidance or jsonschema is not installed.
            ValueError: the schema is invalid or the model has no tokenizer.
        """
        name, judge = repr(self), _judge(self.schema)
        pieces = text_pieces(context, name)
        guide, grammar = _guide(self.schema, self.whitespace)
        matchers = Matchers.compile(grammar, pieces, name=name, judge=judge)
        shown = with_engine(repr(unbound), "host", late=list(guide.late), unchecked=list(guide.unknown))
        return bind_matchers(unbound, matchers, context, shown)

    def __repr__(self) -> str:
        return f"json_schema({shorten(self.schema, NAME_WIDTH)})"


@functools.lru_cache(maxsize=64)
def _judge(schema: str) -> SchemaJudge:
    return SchemaJudge.of(json.loads(schema))


@functools.lru_cache(maxsize=64)
def _guide(schema: str, whitespace: str) -> tuple[Guide, str]:
    """Return the closest guide that the engine takes, and its grammar."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "json_schema(schema) needs llguidance: pip install 'ponder-ppl[grammar]'"
        ) from error
    refusal = ""
    for guide in guides(json.loads(schema), lambda part: not engine_refuses(as_grammar(part, ""))):
        grammar = as_grammar(guide.schema, whitespace)
        refusal = engine_refuses(grammar)
        if not refusal:
            return guide, grammar
    raise ValueError(f"json_schema(schema): the engine refuses even a guide to any JSON: {refusal}")
