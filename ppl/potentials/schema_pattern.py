"""JSON schemas as regular expressions over the JSON text.

What a keyword asks for is honoured or refused, never ignored. outlines-core has a translation too, but it
drops what it does not know (`minimum`, `uniqueItems`, `required` names without a property), concatenates
`allOf`, and its text is not always JSON: quotes may come out of `pattern` and of the formats email and uri,
and recursion ends in a trailing comma.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any
from urllib.parse import unquote

import numpy as np

from ponder.automata.automaton import TokenAutomaton
from ponder.potentials.ecma_pattern import full_match
from ponder.potentials.regex import PATTERN_LIMIT, compile_bounded

__all__ = ["NESTING_LIMIT", "live_bytes", "schema_pattern"]

NESTING_LIMIT = 32
"""Deepest nesting of a schema; the engine refuses parentheses nested some 200 deep."""

MAX_INTEGERS = 10_000
"""Most integers between `minimum` and `maximum`: they are listed."""

_ANNOTATIONS = set(
    "title description default examples example deprecated readOnly writeOnly discriminator "
    "$schema $id $comment $defs definitions".split()
)
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum"},
    "boolean": set(),
    "null": set(),
}
_CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])'
_NATURAL = "(?:0|[1-9][0-9]*)"
_FRACTION = r"(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}


def schema_pattern(schema: Any, whitespace: str) -> str:
    """Translate a schema.

    Args:
        schema: as `json.loads` gives it.
        whitespace: a pattern for what may stand between the parts of arrays and objects.

    Raises:
        ValueError: names the place in the schema and what is wrong there.
    """
    return _Translator(schema, f"(?:{whitespace})" if whitespace else "").pattern(schema, ())


@dataclasses.dataclass(frozen=True)
class _Translator:
    root: Any
    space: str

    def pattern(self, schema: Any, at: tuple[str, ...], refs: tuple[str, ...] = ()) -> str:
        """Translate the schema at a place, in which the references `refs` are being followed."""
        if len(at) > 2 * NESTING_LIMIT:
            raise _error(at, f"is nested more than {NESTING_LIMIT} deep")
        if not isinstance(schema, dict | bool):
            raise _error(at, f"expected a schema, that is an object, got {json.dumps(schema)[:60]}")
        if at and isinstance(schema, dict) and "$id" in schema:
            raise _error(at, "$id: a schema of its own inside another one is not supported")
        keywords = set(schema) - _ANNOTATIONS if isinstance(schema, dict) else set()
        if schema is False:
            raise _error(at, "false accepts nothing")
        if not keywords or schema is True:
            raise _error(at, "accepts any JSON value, which no finite automaton reads; give it a type")
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in keywords:
                self._alone(keywords, {keyword}, at)
                return self._combined(keyword, schema[keyword], at, refs)
        for keyword in ("const", "enum"):
            if keyword in keywords:
                self._alone(keywords, {keyword, "type"}, at)
                return self._listed(keyword, schema, at)
        if "type" not in keywords:
            raise _error(at, f"has no type, only {', '.join(sorted(keywords))}")
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        unknown = [name for name in types if not isinstance(name, str) or name not in _KEYWORDS]
        if unknown or not types:
            raise _error(at, f"type: expected {', '.join(_KEYWORDS)}, got {json.dumps(schema['type'])}")
        self._alone(keywords, {"type"}.union(*(_KEYWORDS[name] for name in types)), at)
        return _union([getattr(self, f"_{name}")(schema, at, refs) for name in types])

    def _alone(self, keywords: set[str], known: set[str], at: tuple[str, ...]) -> None:
        unknown = sorted(keywords - known)
        if unknown:
            beside = f" beside {', '.join(sorted(keywords & known))}" if keywords & known else ""
            raise _error(at, f"{', '.join(unknown)}: not supported{beside}")

    def _combined(self, keyword: str, value: Any, at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        if keyword == "$ref":
            if value in refs:
                raise _error(at, f"$ref: {value!r} refers to itself; recursion is not supported")
            return self.pattern(self._resolved(value, at), (*at, "$ref"), (*refs, value))
        if not isinstance(value, list) or not value:
            raise _error(at, f"{keyword}: expected a list of schemas, got {json.dumps(value)[:60]}")
        if keyword == "allOf" and len(value) > 1:
            raise _error(at, "allOf: not supported with more than one schema")
        if keyword == "oneOf":
            kinds = [self._kind(schema) for schema in value]
            if any(a is None or b is None or _overlap(a, b) for i, a in enumerate(kinds) for b in kinds[:i]):
                raise _error(
                    at,
                    "oneOf: the schemas may overlap (they need other types, or a constant "
                    "property each that tells them apart); use anyOf",
                )
        return _union(self._each(value, (*at, keyword), refs))

    def _each(self, schemas: list[Any], at: tuple[str, ...], refs: tuple[str, ...]) -> list[str]:
        found, total = [], 0
        for i, schema in enumerate(schemas):
            found.append(self.pattern(schema, (*at, str(i)), refs))
            total = _room(at, total + len(found[-1]))
        return found

    def _resolved(self, ref: Any, at: tuple[str, ...]) -> Any:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise _error(at, f"$ref: expected a reference inside the schema, got {json.dumps(ref)[:60]}")
        found = self.root
        for step in ref.split("/")[1:]:  # a JSON pointer in the fragment of a URI
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, dict) and step in found:
                found = found[step]
            else:
                raise _error(at, f"$ref: there is no {ref!r}")
            if isinstance(found, dict) and "$id" in found:
                raise _error(at, f"$ref: {ref!r} leads into a schema with an $id of its own; not supported")
        return found

    def _kind(self, schema: Any) -> tuple[str, dict[str, str]] | None:
        """Type and constant required properties of a schema; None where that is not plain to see."""
        for _ in range(NESTING_LIMIT):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._resolved(schema["$ref"], ())
        if not isinstance(schema, dict) or not isinstance(schema.get("type"), str):
            return None
        properties, required = schema.get("properties", {}), schema.get("required", [])
        return schema["type"], {
            name: json.dumps(properties[name]["const"], sort_keys=True)
            for name in required
            if isinstance(properties.get(name), dict) and "const" in properties[name]
        }

    def _listed(self, keyword: str, schema: dict[str, Any], at: tuple[str, ...]) -> str:
        values = [schema["const"]] if keyword == "const" else schema["enum"]
        if not isinstance(values, list) or not values:
            raise _error(at, f"enum: expected a list of values, got {json.dumps(values)[:60]}")
        types = schema.get("type", list(_KEYWORDS))
        types = types if isinstance(types, list) else [types]
        wrong = [value for value in values if not _types_of(value) & set(types)]
        if wrong:
            raise _error(at, f"{keyword}: {json.dumps(wrong[0])[:60]} is not of type {types}")
        return _union([self._value(value) for value in values])

    def _value(self, value: Any) -> str:
        """One JSON value, spelt as `json.dumps` spells it but for white space."""
        if isinstance(value, list):
            return self._enclosed("[", [self._value(item) for item in value], "]")
        if isinstance(value, dict):
            return self._enclosed("{", [self._property(k, self._value(v)) for k, v in value.items()], "}")
        if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
            return _literal(int(value))
        return _literal(value)

    def _enclosed(self, start: str, parts: list[str], end: str) -> str:
        inside = f"{self.space},{self.space}".join(parts)
        return rf"\{start}{self.space}{inside}{self.space if parts else ''}\{end}"

    def _property(self, name: str, value: str) -> str:
        return f"{_literal(name)}{self.space}:{self.space}{value}"

    def _object(self, schema: dict[str, Any], at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        comma = f"{self.space},{self.space}"
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _error(at, "properties: expected an object, and for required a list")
        missing = [name for name in required if name not in properties]
        if missing:
            raise _error(at, f"required: {missing[0]!r} is not among the properties")
        if not isinstance(others, bool):
            if properties:
                raise _error(at, "additionalProperties: a schema is not supported beside properties")
            value = self.pattern(others, (*at, "additionalProperties"), refs)
            one = f'"{_CHARACTER}*"{self.space}:{self.space}{value}'
            _room(at, 2 * len(one))
            return rf"\{{{self.space}(?:{one}(?:{comma}{one})*{self.space})?\}}"
        if not properties:
            if others:
                raise _error(
                    at,
                    "accepts any object, which no finite automaton reads; give properties, or "
                    "additionalProperties: false",
                )
            return self._enclosed("{", [], "}")
        values = self._each_property(properties, at, refs)
        pairs = [(self._property(name, value), name in required) for name, value in values.items()]
        return rf"\{{{self.space}{self._in_order(pairs, comma, at)}\}}"

    def _each_property(self, properties: dict, at: tuple[str, ...], refs: tuple[str, ...]) -> dict[str, str]:
        found, total = {}, 0
        for name, schema in properties.items():
            found[name] = self.pattern(schema, (*at, name), refs)
            total = _room(at, total + len(found[name]))
        return found

    def _in_order(self, pairs: list[tuple[str, bool]], comma: str, at: tuple[str, ...]) -> str:
        """Properties in the order of the schema; those that are not required may be left out."""

        def rest(after: int) -> str:
            return "".join(f"{comma}{p}" if needed else f"(?:{comma}{p})?" for p, needed in pairs[after:])

        first = next((i for i, (_, needed) in enumerate(pairs) if needed), None)
        if first is not None:
            before = "".join(f"(?:{p}{comma})?" for p, _ in pairs[:first])
            return f"{before}{pairs[first][0]}{rest(first + 1)}{self.space}"
        _room(at, len(pairs) * sum(len(p) for p, _ in pairs))
        alternatives = [f"{p}{rest(i + 1)}" for i, (p, _) in enumerate(pairs)]
        return f"(?:{_union(alternatives)}{self.space})?"

    def _array(self, schema: dict[str, Any], at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        least, most = _bounds(schema, "minItems", "maxItems", at)
        if "prefixItems" in schema:
            fixed = schema["prefixItems"]
            if not isinstance(fixed, list) or schema.get("items", False) is not False:
                raise _error(at, "prefixItems: expected a list, and no items beside it")
            if least > len(fixed) or (most is not None and most < len(fixed)):
                raise _error(at, f"prefixItems: {len(fixed)} items, against minItems or maxItems")
            return self._enclosed("[", self._each(fixed, (*at, "prefixItems"), refs), "]")
        if "items" not in schema:
            raise _error(at, "accepts any items, which no finite automaton reads; give it items")
        if most == 0:
            return self._enclosed("[", [], "]")
        item = self.pattern(schema["items"], (*at, "items"), refs)
        _room(at, 2 * len(item))
        more = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        several = f"{item}(?:{self.space},{self.space}{item}){more}{self.space}"
        return rf"\[{self.space}{several if least else f'(?:{several})?'}\]"

    def _string(self, schema: dict[str, Any], at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        del refs
        least, most = _bounds(schema, "minLength", "maxLength", at)
        special = [k for k in ("pattern", "format") if k in schema]
        if special and (len(special) > 1 or {"minLength", "maxLength"} & set(schema)):
            raise _error(at, f"{special[0]}: not supported beside another keyword for strings")
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise _error(at, f"format: expected {', '.join(_FORMATS)}, got {schema['format']!r}")
            return f'"{_FORMATS[schema["format"]]}"'
        if "pattern" in schema:
            return f'"(?:{self._search(schema["pattern"], at)})"'
        return f'"{_CHARACTER}{{{least},{"" if most is None else most}}}"'

    def _search(self, pattern: Any, at: tuple[str, ...]) -> str:
        """The strings in which a pattern is found, as JSON spells them."""
        if not isinstance(pattern, str):
            raise _error(at, f"pattern: expected a regular expression, got {json.dumps(pattern)[:60]}")
        _room(at, len(pattern))
        try:
            alone, spelt = full_match(pattern, ""), full_match(pattern, f"{_CHARACTER}*")
        except ValueError as error:
            raise _error(at, f"pattern: {error}") from error
        if alone is None or spelt is None:
            raise _error(at, "pattern: look-around, back-references, \\b and inner anchors are not supported")
        escaped = live_bytes(alone, f"{_place(at)}: pattern") & {*range(32), ord('"'), ord("\\")}
        if escaped:
            raise _error(
                at,
                f"pattern: matches texts with {chr(min(escaped))!r}, which JSON escapes; "
                r'exclude quotes, backslashes and controls, as in [^"\\\x00-\x1f]',
            )
        return spelt

    def _integer(self, schema: dict[str, Any], at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        del refs
        bounds = {k: schema[k] for k in sorted(_KEYWORDS["integer"]) if k in schema}
        for name, bound in bounds.items():
            if "integer" not in _types_of(bound):
                raise _error(at, f"{name}: expected an integer, got {json.dumps(bound)[:60]}")
        lows = [int(v) + (k == "exclusiveMinimum") for k, v in bounds.items() if k.endswith("inimum")]
        highs = [int(v) - (k == "exclusiveMaximum") for k, v in bounds.items() if k.endswith("aximum")]
        if lows and highs:
            low, high = max(lows), min(highs)
            if not 0 <= high - low < MAX_INTEGERS:
                raise _error(
                    at, f"expected 1 to {MAX_INTEGERS} integers within the bounds, got [{low}, {high}]"
                )
            return _union([str(i) for i in range(low, high + 1)])
        if lows and max(lows) in (0, 1):
            return _NATURAL if max(lows) == 0 else "[1-9][0-9]*"
        if lows or highs:
            raise _error(at, f"{', '.join(bounds)}: supported are both bounds, or a minimum of 0 or 1 alone")
        return f"-?{_NATURAL}"

    def _number(self, schema: dict[str, Any], at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        del refs
        if schema.get("minimum", 0) != 0:
            raise _error(at, f"minimum: for numbers only 0 is supported, got {json.dumps(schema['minimum'])}")
        return f"{'' if 'minimum' in schema else '-?'}{_NATURAL}{_FRACTION}"

    def _boolean(self, schema: dict[str, Any], at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        del schema, at, refs
        return "(?:true|false)"

    def _null(self, schema: dict[str, Any], at: tuple[str, ...], refs: tuple[str, ...]) -> str:
        del schema, at, refs
        return "null"


def live_bytes(pattern: str, name: str) -> set[int]:
    """Bytes that occur in some text which matches a pattern in full; `name` is for error messages."""
    table, initial, finals = compile_bounded(pattern, name)
    automaton = TokenAutomaton.from_table(table, np.arange(256), initial, finals)
    alive = np.asarray((automaton.next_state >= 0).any(axis=0))[np.asarray(automaton.token_class)]
    return set(np.flatnonzero(alive).tolist())


def _union(patterns: list[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


def _literal(value: Any) -> str:
    return re.escape(json.dumps(value, ensure_ascii=False))


def _types_of(value: Any) -> set[str]:
    """Types of the schema language that a value has; 2.0 is an integer too."""
    if isinstance(value, float) and value.is_integer():
        return {"integer", "number"}
    names = {
        bool: {"boolean"},
        int: {"integer", "number"},
        float: {"number"},
        str: {"string"},
        list: {"array"},
        dict: {"object"},
    }
    return names.get(type(value), {"null"})


def _overlap(a: tuple[str, dict[str, str]], b: tuple[str, dict[str, str]]) -> bool:
    same_type = a[0] == b[0] or {a[0], b[0]} == {"integer", "number"}
    return same_type and all(a[1][name] == b[1][name] for name in a[1].keys() & b[1].keys())


def _bounds(schema: dict[str, Any], lower: str, upper: str, at: tuple[str, ...]) -> tuple[int, int | None]:
    least, most = schema.get(lower, 0), schema.get(upper)
    for name, value in ((lower, least), (upper, most)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise _error(at, f"{name}: expected an integer >= 0, got {json.dumps(value)[:60]}")
    if most is not None and most < least:
        raise _error(at, f"{upper}: expected at least {lower}={least}, got {most}")
    return least, most


def _room(at: tuple[str, ...], length: int) -> int:
    """Refuse a pattern that grows too long, before it is written; return its length."""
    if length > PATTERN_LIMIT:
        raise _error(at, f"gives a pattern of more than {PATTERN_LIMIT} characters; simplify the schema")
    return length


def _error(at: tuple[str, ...], what: str) -> ValueError:
    return ValueError(f"{_place(at)}: {what}")


def _place(at: tuple[str, ...]) -> str:
    steps = at if len(at) <= 8 else (*at[:4], "…", *at[-4:])
    return f"json_schema(schema): at #{''.join(f'/{step}' for step in steps)}"
