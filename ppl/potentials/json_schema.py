"""Potential that asks the whole generated text to be JSON that follows a schema."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

from ponder.arguments import NAME_WIDTH, shorten
from ponder.potentials.automaton_potential import ByteAutomaton
from ponder.potentials.engines import EngineChoice, check_engine
from ponder.potentials.hosted_schema import HostedSchema
from ponder.potentials.regex import compile_bounded
from ponder.potentials.schema_pattern import live_bytes, schema_pattern

__all__ = ["JsonSchema", "json_schema"]


def json_schema(
    schema: str | bool | dict[str, Any] | Any, engine: str = "auto", *, whitespace: str = " ?"
) -> EngineChoice:
    r"""Constrain the generated text to be JSON that follows a schema.

    Φ of a finished trace is 1 if the text before EOS follows the schema and is spelt canonically, else 0.
    There are two engines:

    - the automaton, inside jit: Φ of a prefix is 1 if some continuation within the tokens that remain has
      Φ = 1. It holds schemas whose values are of plain types and nest to a known depth.
    - the host: llguidance says which tokens can follow, one call a step for all particles, and jsonschema
      judges each text when it is complete. It takes every valid schema of draft 2020-12 (and older ones by
      `$schema`) that needs no other document. Φ of a prefix is 1 while llguidance can go on: a particle may
      meet the length limit with brackets open. What llguidance cannot say, such as `not` or `uniqueItems`, is
      seen by the judge alone; the repr of the bound potential lists it as `late`, and as `unchecked` what has
      no meaning: unknown keywords and formats.

    Canonical spelling: properties come in the order in which the schema names them, others last. Strings hold
    characters as they are or escaped by one letter, as in `\n`; the host also takes `\u` for controls that
    have no letter. Whole numbers have no fraction and no exponent. `whitespace` may stand inside brackets and
    around commas and colons, nothing before or after the text. No name occurs twice in an object. The
    automaton writes no more than the schema names: no other properties, unless `additionalProperties` is all
    that it says of an object, and all of `prefixItems` with nothing after them.

    `pattern` is searched for, in ECMA's sense (`\d` and `\w` are ASCII). `format` is asserted for the common
    formats, see the documentation. A string or an array without a limit can take all the tokens that there
    are: give `maxLength` and `maxItems` where the values are short.

    Args:
        schema: a dict, a bool, JSON text of these, or a class with `model_json_schema()`, as pydantic models
            have.
        engine: "automaton", "host", or "auto": the automaton where it holds the schema and its tables fit,
            else the host.
        whitespace: a regular expression for spaces, tabs and line breaks; "" for none.

    Raises:
        TypeError: the schema or `whitespace` is of another type.
        ValueError: the schema is no JSON or no valid schema, a reference leads to another document,
            engine="automaton" cannot hold it, or `whitespace` matches other text.
        ImportError: the host is needed, and the extra `grammar` is not installed.

    Example:
        >>> import ponder
        >>> schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
        >>> person = ponder.json_schema(schema)
    """
    check_engine("json_schema", engine)
    if not isinstance(whitespace, str):
        raise TypeError(f"json_schema(whitespace): expected a str, got {type(whitespace).__name__}")
    if whitespace and live_bytes(whitespace, "json_schema(whitespace)") - set(b" \t\r\n"):
        raise ValueError(
            f"json_schema(whitespace): expected a pattern of spaces, tabs and line breaks, got {whitespace!r}"
        )
    text = _text(schema)
    hosted = HostedSchema(text, whitespace)
    refusal = None
    if engine != "host":
        try:
            return EngineChoice(JsonSchema(text, _translated(text, whitespace)), hosted, engine)
        except ValueError as error:
            if engine == "automaton":
                raise
            refusal = error
    unknown = _check(hosted, refusal)
    if unknown:
        warnings.warn(
            f"json_schema(schema): no keywords of JSON Schema, and without effect: {', '.join(unknown)}",
            stacklevel=2,
        )
    return EngineChoice(None, hosted, engine)


def _translated(text: str, whitespace: str) -> str:
    """Translate a schema for the automaton; ValueError says what it cannot hold."""
    try:
        return schema_pattern(json.loads(text), whitespace)
    except RecursionError:
        raise ValueError("json_schema(schema): is nested too deeply") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"json_schema(schema): expected a valid JSON schema; a keyword has a wrong kind: {error}"
        ) from error


def _check(hosted: HostedSchema, refusal: ValueError | None) -> list[str]:
    """Check a schema for the host, which the automaton may have refused; return keywords without effect."""
    try:
        return hosted.check()
    except ImportError as error:
        why = "" if refusal is None else f"{refusal}, so it is for the host; "
        raise ImportError(f"{why}{error}") from error
    except RecursionError:
        raise ValueError("json_schema(schema): is nested too deeply") from None


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
        if not isinstance(schema, dict | bool):
            raise ValueError(f"json_schema(schema): expected a JSON object, got {type(schema).__name__}")
    if not isinstance(schema, dict | bool):
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
