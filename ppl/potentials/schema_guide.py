"""JSON schemas made into larger ones that llguidance takes.

Every instance of the schema, spelt canonically, is one of its guide. The engine need not be right; so what
it cannot say is left out, and only where that makes the set of instances larger. What is left out is named,
since a judge decides it when the text is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ponder.potentials.ecma_pattern import full_match
from ponder.potentials.schema_formats import FORMATS, GUIDE_PATTERNS, GUIDED
from ponder.potentials.schema_judge import resolver_of, resource_of

__all__ = ["Guide", "as_grammar", "guides"]

_PLAIN = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems"),
    "object": ("required",),
}
_JUDGED = set(
    "not if then else dependentRequired dependentSchemas dependencies contains minContains maxContains "
    "uniqueItems propertyNames unevaluatedItems unevaluatedProperties $dynamicRef $recursiveRef "
    "additionalItems".split()
)
_SILENT = set(
    "title description default examples example deprecated readOnly writeOnly discriminator x-guidance "
    "contentEncoding contentMediaType contentSchema $schema $id id $comment $anchor $dynamicAnchor "
    "$recursiveAnchor $vocabulary $defs definitions".split()
)
_ANYTHING = "(?s:.*)"
_FREE = frozenset(name for name, check in FORMATS.items() if check("\0"))


class Guide(NamedTuple):
    """What the engine is given.

    Attributes:
        schema: in the engine's words, all references to `#/$defs`.
        late: keywords that it leaves to the judge, sorted.
        unknown: keywords and formats that say nothing, as the specification has it, sorted.
    """

    schema: dict[str, Any]
    late: tuple[str, ...]
    unknown: tuple[str, ...]


def guides(schema: Any, takes: Callable[[dict[str, Any]], bool]) -> Iterator[Guide]:
    """Make guides for a schema, the closest first and any JSON at last.

    Args:
        schema: a valid one, all of whose references can be looked up.
        takes: whether the engine takes a small schema; asked for parts that it may refuse.
    """
    for strength in ("all", "no intersections", "nothing"):
        builder = _Builder(takes, strength, schema.get("$schema", "") if isinstance(schema, dict) else "")
        root = {} if strength == "nothing" else builder.guide(schema, resolver_of(schema))
        if strength == "nothing":
            builder.late = set(schema) - _SILENT if isinstance(schema, dict) else {"false"}
        body = root if isinstance(root, dict) else ({} if root else {"not": {}})
        yield Guide(
            {**body, "$defs": builder.definitions},
            tuple(sorted(builder.late)),
            tuple(sorted(builder.unknown)),
        )


class _Builder:
    """The parts of one guide, as they are made.

    Attributes:
        definitions: what references lead to, by name.
        late: keywords left out.
        unknown: keywords without meaning.
    """

    def __init__(self, takes: Callable[[dict[str, Any]], bool], strength: str, draft: str) -> None:
        self.takes = takes
        self.is_old = any(f"draft-0{number}" in draft for number in (3, 4, 6, 7))
        self.unknown_to_draft = {"prefixItems"} | ({"const"} if re.search("draft-0[34]", draft) else set())
        self.strength = strength
        self.definitions: dict[str, Any] = {}
        self.late: set[str] = set()
        self.unknown: set[str] = set()
        self._names: dict[int, str] = {}

    def inner(self, schema: Any, resolver: Any) -> Any:
        """Return the guide of a schema inside one that `resolver` is of."""
        if isinstance(schema, dict) and ("$id" in schema or "id" in schema):
            resolver = resolver.in_subresource(resource_of(schema))
        return self.guide(schema, resolver)

    def guide(self, schema: Any, resolver: Any) -> Any:
        """Return the guide of a schema; `resolver` looks up its references."""
        if not isinstance(schema, dict):
            return schema
        schema = self._of_draft(schema)
        found: dict[str, Any] = {}
        several: list[Any] = []  # alternatives beside others
        for keyword, value in schema.items():  # in this order, which is that of the properties
            if keyword == "$ref":
                found["$ref"] = self._reference(resolver.lookup(value))
            elif keyword in ("anyOf", "oneOf"):
                self.late |= {"oneOf"} & {keyword}
                several.append([self.inner(inner, resolver) for inner in value])
            elif keyword == "allOf":
                found["allOf"] = [self.inner(inner, resolver) for inner in value]
            elif keyword in ("const", "enum") and _has_large_integer(value):
                self.late.add(keyword)  # the engine would round it
            elif keyword in ("type", "const", "enum"):
                found[keyword] = _plain(value)
        self._number(schema, found)
        self._string(schema, found)
        self._array(schema, found, resolver)
        self._object(schema, found, resolver)
        self._note(schema)
        if len(several) == 1:
            found["anyOf"] = several[0]
        elif several:
            found["allOf"] = [*found.get("allOf", []), *({"anyOf": options} for options in several)]
        return self._weakened(found) if self.strength == "no intersections" else found

    def _of_draft(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Leave out what the schema's draft does not know: the judge ignores it."""
        if not self.is_old:
            return schema
        if "$ref" in schema:
            return {"$ref": schema["$ref"]}
        return {keyword: value for keyword, value in schema.items() if keyword not in self.unknown_to_draft}

    def _weakened(self, found: dict[str, Any]) -> dict[str, Any]:
        """Keep one of what would have to be intersected."""
        joined = [keyword for keyword in ("$ref", "allOf", "anyOf") if keyword in found]
        own = set(found) - {"$ref", "allOf", "anyOf"}
        if "allOf" in found and len(found["allOf"]) == 1 and not own and joined == ["allOf"]:
            return found
        if len(joined) + bool(own) <= 1 and joined != ["allOf"]:
            return found
        self.late |= set(joined)
        if own:
            return {keyword: found[keyword] for keyword in found if keyword in own}
        if "allOf" in joined:
            return next((part for part in found["allOf"] if isinstance(part, dict) and part), {})
        return {joined[0]: found[joined[0]]}

    def _reference(self, resolved: Any) -> str:
        key = (
            id(resolved.contents)
            if isinstance(resolved.contents, dict)
            else -int(bool(resolved.contents)) - 1
        )
        if key not in self._names:
            name = self._names[key] = f"g{len(self._names)}"
            self.definitions[name] = {}
            self.definitions[name] = self.guide(resolved.contents, resolved.resolver)
        return f"#/$defs/{self._names[key]}"

    def _number(self, schema: dict[str, Any], found: dict[str, Any]) -> None:
        self._keep(schema, found, _PLAIN["number"], {"type": "number"})

    def _string(self, schema: dict[str, Any], found: dict[str, Any]) -> None:
        self._keep(schema, found, _PLAIN["string"], {"type": "string"})
        patterns = []
        if "pattern" in schema:
            spelt = full_match(schema["pattern"], _ANYTHING)
            patterns.append(None if spelt is None else spelt)
        form = schema.get("format")
        if form in GUIDED:
            found["format"] = form
        elif form in GUIDE_PATTERNS:
            patterns.append(GUIDE_PATTERNS[form])
        elif form in FORMATS and form not in _FREE:
            self.late.add("format")
        for pattern in patterns:
            part = {"pattern": f"^(?:{pattern})$"}
            if pattern is None or not self.takes({"type": "string", **part}):
                self.late.add("pattern")
            elif "pattern" in found:
                found["allOf"] = [*found.get("allOf", []), part]
            else:
                found |= part
        together = {k: found[k] for k in ("minLength", "maxLength", "pattern", "format") if k in found}
        if "format" in together and not self.takes({"type": "string", **together}):
            del found["format"]
            self.late.add("format")

    def _array(self, schema: dict[str, Any], found: dict[str, Any], resolver: Any) -> None:
        self._keep(schema, found, _PLAIN["array"], {"type": "array"})
        items = schema.get("items", True)
        if isinstance(items, list):  # as in the older drafts, where "additionalItems" is what follows
            self.late.add("items")
            return
        if "prefixItems" in schema:
            found["prefixItems"] = [self.inner(inner, resolver) for inner in schema["prefixItems"]]
        if "items" in schema:
            found["items"] = self.inner(items, resolver)

    def _object(self, schema: dict[str, Any], found: dict[str, Any], resolver: Any) -> None:
        self._keep(schema, found, _PLAIN["object"], {"type": "object"})
        if "properties" in schema:
            found["properties"] = {n: self.inner(s, resolver) for n, s in schema["properties"].items()}
        others = schema.get("additionalProperties", True)
        patterns = {}
        for pattern, inner in schema.get("patternProperties", {}).items():
            spelt = full_match(pattern, _ANYTHING)
            patterns[None if spelt is None else f"^(?:{spelt})$"] = inner
        shape = {"type": "object", "patternProperties": dict.fromkeys(patterns, True)}
        shape["properties"] = dict.fromkeys(schema.get("properties", {}), True)
        if patterns and (None in patterns or not self.takes(shape)):
            # Without its exceptions, "additionalProperties" would ask for more.
            names = {"patternProperties", "additionalProperties", "minProperties", "maxProperties"}
            self.late |= names & set(schema)
            return
        if patterns:
            found["patternProperties"] = {p: self.inner(s, resolver) for p, s in patterns.items()}
        if "additionalProperties" in schema:
            found["additionalProperties"] = self.inner(others, resolver)
        counts = {k: int(schema[k]) for k in ("minProperties", "maxProperties") if schema.get(k)}
        if not schema.get("properties") and not {"allOf", "anyOf", "$ref"} & set(found):
            found |= counts
        else:
            self.late |= set(counts)

    def _keep(self, schema: dict, found: dict, keywords: tuple[str, ...], kind: dict[str, Any]) -> None:
        for keyword in keywords:
            value = schema.get(keyword)
            if value is None or isinstance(value, bool):
                continue
            part = {keyword: _plain(value)}
            if self.takes({**kind, **part}):
                found |= part
            else:
                self.late.add(keyword)

    def _note(self, schema: dict[str, Any]) -> None:
        """Write down what is judged late or means nothing."""
        kept = {keyword for keywords in _PLAIN.values() for keyword in keywords}
        kept |= set("$ref anyOf oneOf allOf type const enum pattern format items prefixItems".split())
        kept |= set("properties additionalProperties patternProperties minProperties maxProperties".split())
        for keyword, value in schema.items():
            if keyword in _JUDGED and not (keyword == "uniqueItems" and value is False):
                self.late.add(keyword)
            elif keyword not in kept | _SILENT | _JUDGED and not keyword.startswith("x-"):
                self.unknown.add(keyword)
        form = schema.get("format")
        if form is not None and form not in FORMATS:
            self.unknown.add(f"format {form}")


def _has_large_integer(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_has_large_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and abs(value) > 2**53


def _plain(value: Any) -> Any:
    """Write whole numbers without a fraction, as the engine and the canonical spelling do."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def as_grammar(schema: dict[str, Any], whitespace: str) -> str:
    """Write a guide as a grammar of the engine."""
    options: dict[str, Any] = {"whitespace_flexible": False}
    if whitespace:
        options = {"whitespace_pattern": whitespace}
    text = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
    return f"start: %json {text}\n"
