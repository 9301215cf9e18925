"""Potential that asks the whole generated text to be JSON that follows a schema."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ponder.arguments import NAME_WIDTH, shorten
from ponder.potentials.automaton_potential import ByteAutomaton, LanguagePotential
from ponder.potentials.regex import compile_bounded
from ponder.potentials.schema_pattern import live_bytes, schema_pattern

__all__ = ["JsonSchema", "json_schema"]


def json_schema(schema: str | dict[str, Any] | Any, *, whitespace: str = " ?") -> LanguagePotential:
    r"""Constrain the generated text to be JSON that follows a schema.

    Φ of a finished trace is 1 if the text before EOS is such JSON in the spelling below, else 0; Φ of a
    prefix is 1 if some continuation within the tokens that remain is, else 0.

    The spelling: properties come in the order of the schema, those that are not required may be left out, and
    there are no others. Strings hold characters as they are or escaped by one letter, as in `\n`, but no
    `\u`. `whitespace` may stand inside brackets and around commas and colons, nothing before or after the
    text. `enum` and `const` are spelt as `json.dumps` spells them.

    Supported: `type` (one or a list) with `properties`, `required`, `additionalProperties` (false, or a
    schema where there are no properties); `items`, `minItems`, `maxItems`, `prefixItems` (all of them, no
    more); `minLength`, `maxLength`; `pattern` (of the whole string, in the syntax of `regex`); `format` date,
    time, date-time, uuid; integers between bounds, or with a minimum of 0 or 1; numbers with a minimum of 0;
    `enum`, `const`, `anyOf`, `oneOf` of schemas that cannot overlap, `$ref` inside the schema without
    recursion. All else is refused by name. A string or an array without a limit can take all the tokens that
    there are: give `maxLength` and `maxItems` where the values are short.

    Args:
        schema: a dict, its JSON text, or a class with `model_json_schema()`, as pydantic models have.
        whitespace: a regular expression for spaces, tabs and line breaks; "" for none.

    Raises:
        TypeError: the schema or `whitespace` is of another type.
        ValueError: the schema is no JSON, asks for what is not supported, or `whitespace` matches other text.

    Example:
        >>> import ponder
        >>> schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
        >>> person = ponder.json_schema(schema)
    """
    if not isinstance(whitespace, str):
        raise TypeError(f"json_schema(whitespace): expected a str, got {type(whitespace).__name__}")
    if whitespace and live_bytes(whitespace, "json_schema(whitespace)") - set(b" \t\r\n"):
        raise ValueError(
            f"json_schema(whitespace): expected a pattern of spaces, tabs and line breaks, got {whitespace!r}"
        )
    text = _text(schema)
    try:
        pattern = schema_pattern(json.loads(text), whitespace)
    except RecursionError:
        raise ValueError("json_schema(schema): is nested too deeply") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"json_schema(schema): expected a valid JSON schema; a keyword has a wrong kind: {error}"
        ) from error
    return LanguagePotential(JsonSchema(text, pattern))


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """The JSON texts that follow a schema.

    Attributes:
        schema: as JSON text.
        pattern: the regular expression that it was translated to.
    """

    schema: str
    pattern: str

    def byte_automaton(self) -> ByteAutomaton:
        """See `Language`."""
        return compile_bounded(self.pattern, repr(self))

    def __repr__(self) -> str:
        return f"json_schema({shorten(self.schema, NAME_WIDTH)})"


def _text(schema: Any) -> str:
    """Return a schema as JSON text, whatever form it came in."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"json_schema(schema): expected JSON text, got {schema[:60]!r}: {error}"
            ) from error
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema(schema): expected a JSON object, got {type(schema).__name__}")
    if not isinstance(schema, dict):
        raise TypeError(
            "json_schema(schema): expected a dict, JSON text or a class with model_json_schema(), "
            f"got {type(schema).__name__}"
        )
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema(schema): cannot be written as JSON: {error}") from error
    return text
