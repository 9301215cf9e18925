import itertools
import json
import random

import jax
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.enumeration import enumerate_traces
from ponder.models import PieceTokenizer, TableLM

# Merged tokens, the two halves of "é", EOS.
PIECES = (b'{"a":', b"}", b"1", b"-", b'"', b"\xc3", b"\xa9", b'"}', b"")
SHORT = {
    "type": "object",
    "properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]}},
    "required": ["a"],
}


@pytest.fixture(scope="module")
def lm():
    return TableLM.random(
        jax.random.key(5), len(PIECES), scale=0.7, eos_token_ids=(8,), tokenizer=PieceTokenizer(PIECES)
    )


def program(lm, potential):
    return ponder.Generation(lm, [0, 1], max_new_tokens=5, potential=potential)


def follows_short(text):
    try:
        value = json.loads(text)
    except ValueError:
        return False
    a = value.get("a") if isinstance(value, dict) and list(value) == ["a"] else None
    return type(a) is int or (isinstance(a, str) and len(a) <= 2)


def test_evidence_is_the_mass_of_what_python_accepts(lm):
    everything = enumerate_traces(program(lm, None))
    mass = np.exp(everything.log_prior.astype(np.float64))
    texts = [
        b"".join(PIECES[token] for token in tokens[:n]).decode(errors="replace")
        for tokens, n in zip(everything.tokens, everything.lengths, strict=True)
    ]
    allowed = np.array([follows_short(text) and "\ufffd" not in text for text in texts])
    assert {'{"a":11}', '{"a":-1}', '{"a":"é"}', '{"a":""}'} <= {texts[i] for i in np.flatnonzero(allowed)}
    posterior = inference.exact(program(lm, ponder.json_schema(SHORT))).run(jax.random.key(0))
    np.testing.assert_allclose(posterior.log_evidence, np.log(mass[allowed].sum()), atol=1e-5)
    assert set(posterior.text) == {texts[i] for i in np.flatnonzero(allowed)}


@pytest.mark.slow
def test_laws(lm):
    ponder.testing.check_potential(ponder.json_schema(SHORT), lm, num_steps=5)


@pytest.mark.slow
def test_smc_is_proper(lm):
    model = program(lm, ponder.json_schema(SHORT))
    report = ponder.testing.check_algorithm(inference.smc(model, 3), model, num_runs=1000)
    assert abs(report.evidence_z) < 5


def reader(schema, **settings):
    table, initial, finals = ponder.json_schema(schema, **settings).language.byte_automaton()

    def accepts(text):
        state = initial
        for byte in text.encode():
            state = table[state, byte] if state >= 0 else -1
        return bool(state in finals)

    return accepts, (table, initial, finals)


def obj(properties, required=(), **more):
    return {"type": "object", "properties": properties, "required": list(required), **more}


NULL = {"type": "null"}
TREE = obj({"v": {"$ref": "#/$defs/x"}}, ["v"], **{"$defs": {"x": {"type": "integer"}}})
TAGGED = [obj({"k": {"const": k}, k: NULL}, ["k"]) for k in ("a", "b")]


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (NULL, "null", "true|nul|| null"),
        ({"type": "boolean"}, "true|false", "True|1"),
        ({"type": "integer"}, "0|-12|-0|907", "01|1.0|+1|-|"),
        ({"type": "integer", "minimum": -2, "exclusiveMaximum": 11}, "-2|0|10", "-3|11|-0|00"),
        ({"type": "integer", "exclusiveMinimum": 0}, "1|10", "0|-1"),
        ({"type": "number"}, "0|-1.50|2e9|1.5E-07", "1.|.5|1e|NaN|01.5"),
        ({"type": "number", "minimum": 0}, "0|1.5", "-1.5"),
        ({"type": "string"}, r'""|"a\n\"\\"|"日本 語"', '"a|"\\x"|"\t"|"\\u00e9"|"a"b"|' + "''"),
        ({"type": "string", "minLength": 1, "maxLength": 2}, r'"é"|"\n日"', '""|"abc"'),
        ({"type": "string", "pattern": "^[a-c]+(x|y)$"}, '"ax"|"cby"', '"x"|"axx"|ax'),
        ({"type": "string", "format": "date"}, '"2024-02-29"|"1999-12-31"', '"2023-02-29"|"2024-04-31"'),
        ({"type": "string", "format": "time"}, '"23:59:00Z"|"01:02:03.5+01:00"', '"24:00:00Z"|"01:02:03"'),
        ({"type": "string", "format": "date-time"}, '"2000-02-29T00:00:00Z"', '"1900-02-29T00:00:00Z"'),
        ({"type": "string", "format": "uuid"}, '"01234567-89ab-cdef-0123-456789abcdef"', '"0123"'),
        ({"enum": ["a.b", 1, None, 2.5, 'q"é\n', {"x y": [1, []]}]},
         r'"a.b"|1|null|2.5|"q\"é\n"|{"x y": [1, []]}', '"axb"|2|{"x y":[1]}'),
        ({"const": "#a b", "type": "string"}, '"#a b"', '"#ab"'),
        ({"type": ["string", "null"], "maxLength": 1}, '"a"|null', '"ab"|1'),
        ({"anyOf": [{"type": "integer"}, NULL]}, "1|null", "1null|"),
        ({"oneOf": TAGGED}, '{"k": "a", "a": null}|{"k": "b"}', '{"k": "a", "b": null}'),
        ({"allOf": [NULL]}, "null", "1"),
        (TREE, '{"v": 3}', '{"v": null}|{}'),
        ({"type": "array", "items": NULL}, "[]|[ ]|[null,null, null]", "[,]|[null,]|null"),
        ({"type": "array", "items": NULL, "minItems": 1, "maxItems": 2}, "[null]|[null, null]",
         "[]|[null,null,null]"),
        ({"type": "array", "items": NULL, "maxItems": 0}, "[]", "[null]"),
        ({"type": "array", "items": NULL, "maxItems": 1}, "[]|[null]", "[null,null]"),
        ({"type": "array", "prefixItems": [NULL, {"type": "integer"}]}, "[null, 1]", "[null]|[1,null]"),
        (obj({"b": NULL, "a": NULL}, ["a", "b"]), '{"b":null,"a":null}|{ "b" : null , "a" : null }',
         '{"a":null,"b":null}|{"b":null}|{"b":null,"a":null,}'),
        (obj({"a": NULL, "b": NULL, "c": NULL}, ["b"]),
         '{"b":null}|{"a":null,"b":null}|{"b":null,"c":null}|{"a":null,"b":null,"c":null}',
         '{"a":null}|{,"b":null}|{"a":null"b":null}|{}'),
        (obj({"a": NULL, "b": NULL, "c": NULL}),
         '{}|{"a":null}|{"c":null}|{"a":null,"c":null}|{"a":null,"b":null,"c":null}',
         '{,}|{"c":null,"a":null}|{"a":null,}'),
        (obj({"a.b\n": NULL}, ["a.b\n"]), r'{"a.b\n": null}', r'{"axb\n": null}'),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, '{}|{"x": 1, "é": 2}', '{"x": 1,}'),
        ({"type": "object", "additionalProperties": False}, "{}|{ }", '{"x": 1}'),
    ],
    ids=str,
)  # fmt: skip
def test_accepts_what_follows_the_schema(schema, right, wrong):
    accepts, automaton = reader(schema)
    assert [text for text in right.split("|") if not accepts(text)] == []
    assert [text for text in wrong.split("|") if accepts(text)] == []
    for text in walks(*automaton, num=20):
        json.loads(text)


def walks(table, initial, finals, num):
    """Random texts of a language."""
    rng = random.Random(0)
    for _ in range(num):
        state, text = initial, bytearray()
        while not (state in finals and (rng.random() < 0.3 or (table[state] < 0).all())):
            text.append(int(rng.choice(np.flatnonzero(table[state] >= 0))))
            state = table[state, text[-1]]
        yield text.decode()


def test_white_space():
    schema = obj({"a": {"type": "array", "items": NULL}}, ["a"])
    compact, _ = reader(schema, whitespace="")
    assert compact('{"a":[null,null]}') and not compact('{"a": [null,null]}')
    wide, _ = reader(schema, whitespace=r"[ \n]{0,4}")
    assert wide('{\n  "a": [\n  ]\n}') and not wide('{\t"a": []}')
    with pytest.raises(ValueError, match=r"whitespace\): expected a pattern of spaces, .*got '\[a \]\*'"):
        ponder.json_schema(schema, whitespace="[a ]*")
    with pytest.raises(TypeError, match=r"json_schema\(whitespace\): expected a str, got int"):
        ponder.json_schema(schema, whitespace=2)  # pyright: ignore[reportArgumentType]


def test_forms_of_a_schema():
    class Pydantic:
        @classmethod
        def model_json_schema(cls):
            return SHORT

    languages = {ponder.json_schema(s).language for s in (SHORT, json.dumps(SHORT), Pydantic)}
    assert len(languages) == 1
    assert repr(ponder.json_schema(NULL)) == 'json_schema({"type": "null"})'


RECURSIVE = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
DEEP = NULL
for _ in range(100):
    DEEP = {"type": "array", "items": DEEP}
DOUBLING = {
    "$defs": {f"d{i}": obj({"a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}}, "ab")
              for i in range(25)} | {"d25": NULL},
    "$ref": "#/$defs/d0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({}, "at #: accepts any JSON value"),
        (obj({"x": {"description": "free"}}, ["x"]), "at #/x: accepts any JSON value"),
        ({"type": "object"}, "accepts any object"),
        ({"type": "array"}, "accepts any items"),
        ({"type": "foo"}, 'type: expected object, .* got "foo"'),
        ({"minLength": 2}, "has no type, only minLength"),
        ({"type": "array", "items": NULL, "uniqueItems": True}, "uniqueItems: not supported"),
        ({"type": "number", "multipleOf": 2}, "multipleOf: not supported"),
        ({"type": "integer", "minimum": 5}, "minimum: supported are both bounds"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, r"1 to 10000 integers .* got \[5, 4\]"),
        ({"type": "integer", "minimum": 0.5}, "minimum: expected an integer, got 0.5"),
        ({"type": "number", "minimum": 1.5}, "minimum: for numbers only 0 is supported, got 1.5"),
        ({"type": "string", "format": "email"}, "format: expected date, .* got 'email'"),
        ({"type": "string", "pattern": "a.*"}, "pattern: matches texts with .* which JSON escapes"),
        ({"type": "string", "pattern": "a)(b"}, "pattern: unbalanced parenthesis"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern: not supported beside"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "maxLength: expected at least minLength=3"),
        ({"type": "string", "maxLength": -1}, "maxLength: expected an integer >= 0"),
        (obj({"a": NULL}, ["b"]), "required: 'b' is not among the properties"),
        (obj({"a": NULL}, additionalProperties=NULL), "not supported beside properties"),
        (obj({"a": NULL}, patternProperties={"b": NULL}), "patternProperties: not supported"),
        ({"enum": []}, "enum: expected .*, got \\[\\]"),
        ({"enum": ["a", 1], "type": "string"}, "enum: 1 is not of type"),
        ({"not": NULL}, "has no type, only not"),
        ({"allOf": [NULL, NULL]}, "allOf: not supported with more than one"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf: the schemas may overlap"),
        ({"anyOf": [NULL], "type": "null"}, "type: not supported beside anyOf"),
        ({"$ref": "https://example.org/s"}, "expected a reference inside the schema"),
        ({"$ref": "#/$defs/none"}, "there is no '#/\\$defs/none'"),
        (RECURSIVE, "refers to itself; recursion is not supported"),
        (DEEP, "is nested more than 32 deep"),
        (DOUBLING, "gives a pattern of more than 262144 characters"),
        ("{", "expected JSON text, got '{'"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "expected JSON"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        ({"const": {1}}, "cannot be written as JSON"),
        ({"const": "\ud800"}, "cannot be written as JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_automaton_names_what_it_does_not_support(schema, message):
    with pytest.raises(ValueError, match=message):
        ponder.json_schema(schema, "automaton")


def test_refuses_what_is_no_schema(lm):
    with pytest.raises(TypeError, match=r"json_schema\(schema\): expected a dict, .* got int"):
        ponder.json_schema(3)
    with pytest.raises(ValueError, match=r"cannot be matched within .*=2: the shortest .* 3 tokens"):
        ponder.json_schema(SHORT).bind(ponder.Context(lm, 2))


@pytest.mark.slow
def test_a_real_model_writes_what_follows_the_schema(smollm2):
    schema = obj(
        {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
        },
        ["name", "age", "colours"],
    )
    question = [{"role": "user", "content": "Describe a person as JSON."}]
    model = ponder.Generation(
        smollm2, question, max_new_tokens=36, potential=ponder.json_schema(schema), overflow="force_eos"
    )
    posterior = inference.smc(model, 4).run(jax.random.key(1))
    assert np.isfinite(posterior.log_evidence)
    for text in posterior.text:
        value = json.loads(text)
        assert list(value) == ["name", "age", "colours"]
        assert 1 <= len(value["name"]) <= 8 and 0 <= value["age"] <= 120 and type(value["age"]) is int
        assert len(value["colours"]) <= 2 and set(value["colours"]) <= {"red", "blue"}


def test_all_short_texts_agree_with_python():
    """Every text of up to five characters over a small alphabet, judged by json.loads."""
    accepts, _ = reader({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, whitespace=" *")
    for length in range(6):
        for letters in itertools.product("[], 1-0", repeat=length):
            text = "".join(letters)
            try:
                value = json.loads(text)
                right = isinstance(value, list) and all(type(x) is int for x in value) and len(value) <= 2
            except ValueError:
                right = False
            assert accepts(text) == (right and text == text.strip()), text
