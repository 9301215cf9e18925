"""Which texts are instances of a JSON schema: the exact verdict on a complete text, by jsonschema."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from ponder.potentials.ecma_pattern import search_pattern
from ponder.potentials.schema_formats import FORMATS

__all__ = ["SchemaJudge", "read_json", "resolver_of", "resource_of"]

_ONE = set(
    "additionalItems additionalProperties contains contentSchema else if items not propertyNames then "
    "unevaluatedItems unevaluatedProperties".split()
)
_SEVERAL = {"allOf", "anyOf", "items", "oneOf", "prefixItems"}
_NAMED = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}


@dataclasses.dataclass(frozen=True)
class SchemaJudge:
    """Tells whether a text is JSON that follows a schema; equal where the schemas are.

    Attributes:
        schema: as JSON text.
        is_valid: the validator's verdict on a value.
    """

    schema: str
    is_valid: Callable[[Any], bool] = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, schema: Any) -> SchemaJudge:
        """Check a schema and make its validator.

        Raises:
            ImportError: jsonschema is not installed.
            ValueError: it is no valid schema, a reference leads outside, or a pattern cannot be read.
        """
        try:
            from jsonschema import FormatChecker, validators
            from jsonschema.exceptions import SchemaError
        except ImportError as error:
            raise ImportError(
                "json_schema(schema) needs jsonschema: pip install 'ponder-ppl[grammar]'"
            ) from error
        draft = _draft(schema, validators)
        try:
            draft.check_schema(schema, format_checker=FormatChecker(formats=()))
        except SchemaError as error:
            found = json.dumps(error.instance)[:60]
            raise _error(
                error.absolute_path, f"expected a valid JSON schema; {found}: {error.message[:200]}"
            ) from None
        _check_references(schema)
        checker = FormatChecker(formats=())
        for name, is_of_format in FORMATS.items():
            checker.checks(name)(lambda value, check=is_of_format: not isinstance(value, str) or check(value))
        exact = validators.extend(draft, {name: _is_multiple for name in ("multipleOf", "divisibleBy")})
        validator = exact(_for_python(schema, ()), registry=_registry(), format_checker=checker)
        if any(_verdict(validator.is_valid, value) is None for value in (None, True, 0, "", [], {})):
            raise ValueError("json_schema(schema): a reference leads back to itself, without end")
        return cls(json.dumps(schema, ensure_ascii=False), validator.is_valid)

    def __call__(self, text: str) -> bool:
        """Judge one text; one that is nested too deeply to be judged is refused."""
        try:
            value = read_json(text)
        except (ValueError, RecursionError):
            return False
        return _verdict(self.is_valid, value) is True


def _verdict(is_valid: Callable[[Any], bool], value: Any) -> bool | None:
    """Judge a value; None where that takes more recursion, or a larger number, than there is."""
    try:
        return is_valid(value)
    except (RecursionError, OverflowError):
        return None
    except BaseException as error:
        # What the validator's native parts make of a RecursionError; it is no subclass of Exception.
        if type(error).__name__ == "PanicException":
            return None
        raise


def _is_multiple(validator: Any, divisor: Any, value: Any, schema: Any) -> Iterator[Any]:
    """Judge `multipleOf` by the decimals that are written: 19.99 is a multiple of 0.01, which floats deny."""
    from jsonschema.exceptions import ValidationError

    del schema
    if not validator.is_type(value, "number"):
        return
    if not math.isfinite(value) or Fraction(str(value)) % Fraction(str(divisor)):
        yield ValidationError(f"{value} is not a multiple of {divisor}")


def read_json(text: str) -> Any:
    """Parse strict JSON: no NaN, no number beyond floats, no name twice in an object, nothing around it.

    Raises:
        ValueError: it is something else.
    """
    if text != text.strip(" \t\r\n"):
        raise ValueError("white space around the JSON text")
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)


def resolver_of(schema: Any) -> Any:
    """Return what looks up the references of a schema, in it and in the published metaschemas."""
    return _registry().resolver_with_root(resource_of(schema))


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is beyond the range of floats")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _draft(schema: Any, validators: Any) -> Any:
    """Return the validator class of a schema, by its `$schema`."""
    named = schema.get("$schema") if isinstance(schema, dict) else None
    if named is None:
        return validators.Draft202012Validator
    draft = validators.validator_for(schema, default=None) if isinstance(named, str) else None
    if draft is None:
        raise _error(("$schema",), f"expected a draft of JSON Schema, got {json.dumps(named)[:80]}")
    return draft


def _registry() -> Any:
    from jsonschema_specifications import REGISTRY

    return REGISTRY  # with nothing that would fetch a document


def resource_of(schema: Any) -> Any:
    """Return a schema as `referencing` wants it, of its own draft."""
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    if isinstance(schema, bool):
        return DRAFT202012.create_resource(schema)
    return Resource.from_contents(schema, default_specification=DRAFT202012)


def _check_references(schema: Any) -> None:
    from referencing.exceptions import Unresolvable

    def check(resource: Any, resolver: Any) -> None:
        if isinstance(resource.contents, dict):
            for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
                ref = resource.contents.get(keyword)
                if isinstance(ref, str):
                    try:
                        resolver.lookup(ref)
                    except (Unresolvable, ValueError) as error:
                        raise ValueError(
                            f"json_schema(schema): {keyword}: there is no {ref!r} in the schema, and no "
                            "other document is fetched"
                        ) from error
        for inner in resource.subresources():
            check(inner, resolver.in_subresource(inner))

    root = resource_of(schema)
    check(root, _registry().resolver_with_root(root))


def _for_python(schema: Any, at: tuple[str, ...]) -> Any:
    """Copy a schema, its patterns respelt for Python."""
    if not isinstance(schema, dict):
        return schema
    found = {}
    for keyword, value in schema.items():
        here = (*at, keyword)
        if keyword == "pattern" and isinstance(value, str):
            value = _pattern(value, here)
        elif keyword in _NAMED and isinstance(value, dict):
            value = {
                _pattern(name, here) if keyword == "patternProperties" else name: _for_python(
                    inner, (*here, name)
                )
                for name, inner in value.items()
            }
        elif keyword in _SEVERAL and isinstance(value, list):
            value = [_for_python(inner, (*here, str(i))) for i, inner in enumerate(value)]
        elif keyword in _ONE:
            value = _for_python(value, here)
        else:
            value = copy.deepcopy(value)
        found[keyword] = value
    return found


def _pattern(pattern: str, at: tuple[str, ...]) -> str:
    try:
        return search_pattern(pattern)
    except ValueError as error:
        raise _error(at, f"{pattern[:60]!r} is no pattern: {error}") from error


def _error(at: Any, what: str) -> ValueError:
    return ValueError(f"json_schema(schema): at #{''.join(f'/{step}' for step in at)}: {what}")
