"""JSON schemas on the host: llguidance guides, jsonschema judges."""

import builtins
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.automata import automaton
from ponder.enumeration import enumerate_traces
from ponder.models import PieceTokenizer, TableLM
from ponder.potentials.grammar_matching import Matchers
from ponder.potentials.hosted_schema import HostedSchema, _guide
from ponder.potentials.schema_judge import SchemaJudge

# Bytes; two merged tokens, the halves of "é", one without text and EOS.
BYTES = tuple(bytes([byte]) for byte in b'[]{}:," -.0123456789abcdefklnorstuvxyz')
PIECES = (*BYTES, b'":', b"1,", b"\xc3", b"\xa9", b"", b"")
EOS = len(PIECES) - 1
NULL = {"type": "null"}


def lm_of(pieces):
    return TableLM.random(
        jax.random.key(0),
        len(pieces),
        order=1,
        eos_token_ids=(len(pieces) - 1,),
        tokenizer=PieceTokenizer(pieces),
    )


def spell(text):
    return [PIECES.index(bytes([byte])) for byte in text.encode()]


def weights(schema, texts, **settings):
    """Which texts have weight on the host, by its matchers: prefix by prefix, as a run would ask them."""
    limit = max(map(len, texts)) + 2
    bound = ponder.json_schema(schema, "host", **settings).bind(ponder.Context(lm_of(PIECES), limit))
    return {text: follows(bound.matchers, spell(text), limit) for text in texts}


def follows(matchers, tokens, limit):
    row = np.zeros((1, limit), np.int32)
    row[0, : len(tokens)] = tokens
    for end, token in enumerate(tokens):
        allowed, _ = matchers(row, np.array([end]), np.ones(1, bool))
        if not allowed[0, token // 8] >> token % 8 & 1:
            return False
    return bool(matchers(row, np.array([len(tokens)]), np.ones(1, bool))[1][0])


def obj(properties, **more):
    return {"type": "object", "properties": properties, **more}


TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        # What the judge alone sees.
        ({"type": "array", "uniqueItems": True}, "[1,2];[1, [1]]", "[1,1];[[1], [1]];[1,1"),
        ({"not": {"type": "string"}}, '1;null;[]', '"a"'),
        ({"if": {"type": "integer"}, "then": {"minimum": 5}, "else": NULL}, "7;null", '1;"a"'),
        ({"dependentRequired": {"a": ["b"]}}, '{"a":1,"b":2};{"b":1};{}', '{"a":1}'),
        ({"propertyNames": {"maxLength": 1}}, '{"a":1}', '{"ab":1}'),
        ({"contains": {"const": 1}, "maxContains": 1}, "[1];[0, 1]", "[];[1,1]"),
        ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, "2;3;4", "6;1"),
        ({"allOf": [obj({"a": {"type": "integer"}})], "unevaluatedProperties": False},
         '{"a": 1}', '{"a": 1, "b": 1}'),
        ({"type": "string", "pattern": "^(?!ab)"}, '"ba"', '"ab"'),
        # What the guide holds where the automaton does not.
        (TREE, "[];[[],[[]]]", "[1]"),
        ({"type": "integer", "minimum": 12}, "12;120", "11;-12"),
        ({"type": "number", "multipleOf": 0.5}, "1.5;2", "1.2"),
        (obj({"a": NULL}, additionalProperties={"type": "integer"}), '{"a":null,"b":1}', '{"b":null}'),
        ({"patternProperties": {"^a": NULL}}, '{"ab":null};{"b":1}', '{"ab":1}'),
        ({"allOf": [{"minimum": 2}, {"maximum": 3}]}, "2;3", "1;4"),
        ({"anyOf": [{"const": 1.0}, NULL], "type": ["integer", "null"]}, "1;null", "2"),
        ({"type": "string", "format": "ipv4"}, '"1.2.3.4"', '"1.2.3"'),
        # References are fragments of a URI.
        ({"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": NULL}}, "null", "1"),
        ({"$ref": "#/anyOf/1", "anyOf": [{"type": "integer"}, NULL]}, "null", "1"),
        ({"$ref": "#x", "$defs": {"y": {"$anchor": "x", "type": "null"}}}, "null", "1"),
        # Everything, and nothing.
        (True, '1;{"a":[null]};"é"', "[1;a"),
        ({}, "null", "nul"),
        (False, "", "null;1"),
        # Strict JSON: no name twice, nothing around.
        ({"type": "object"}, '{"a":1}', '{"a":1,"a":1}; {};{} '),
    ],
    ids=str,
)  # fmt: skip
def test_the_guide_allows_and_the_judge_decides(schema, right, wrong):
    right, wrong = ([t for t in texts.split(";") if t] for texts in (right, wrong))
    found = weights(schema, [*right, *wrong])
    assert [text for text in right if not found[text]] == []
    assert [text for text in wrong if found[text]] == []


def test_evidence_is_the_mass_of_what_jsonschema_accepts():
    """All traces of a small vocabulary: the engine and the judge lose none and add none."""
    import jsonschema

    pieces = (b"[", b"]", b"1", b",", b"2,", b"{}", b"")
    schema = {"type": "array", "uniqueItems": True, "contains": {"minimum": 2}, "not": {"minItems": 3}}
    validator, lm = jsonschema.Draft202012Validator(schema), lm_of(pieces)

    def accepts(text):
        try:
            return validator.is_valid(json.loads(text))
        except ValueError:
            return False

    everything = enumerate_traces(ponder.Generation(lm, [0], max_new_tokens=4))
    texts = [
        b"".join(pieces[token] for token in tokens[:n]).decode()
        for tokens, n in zip(everything.tokens, everything.lengths, strict=True)
    ]
    allowed = np.array([accepts(text) for text in texts])
    program = ponder.Generation(lm, [0], max_new_tokens=4, potential=ponder.json_schema(schema))
    posterior = ponder.inference.exact(program).run()
    assert set(posterior.text) == {text for text, fine in zip(texts, allowed, strict=True) if fine}
    mass = np.exp(everything.log_prior.astype(np.float64))[allowed].sum()
    np.testing.assert_allclose(posterior.log_evidence, np.log(mass), atol=1e-5)


@pytest.mark.slow
def test_smc_is_proper_and_the_laws_hold():
    lm = lm_of((b"[", b"]", b"1", b",", b"2,", b""))
    potential = ponder.json_schema({"type": "array", "items": {"type": "integer"}, "uniqueItems": True})
    ponder.testing.check_potential(potential, lm, num_steps=5)
    program = ponder.Generation(lm, [0], max_new_tokens=5, potential=potential)
    ponder.testing.check_algorithm(ponder.inference.smc(program, 6), program, num_runs=1000)


def test_the_last_token_is_guided_by_the_judge():
    """One token before the limit, only what makes an instance is allowed."""
    pieces = (b"1", b"2", b"3", b"")
    bound = ponder.json_schema({"not": {"const": 12}}, "host").bind(ponder.Context(lm_of(pieces), 2))
    state = bound.update(bound.init(1), jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
    assert (np.asarray(bound.token_logits(state)[0]) == 0).tolist() == [True, False, True, True]


def test_too_large_a_table_goes_to_the_host(monkeypatch):
    """Optional fields, all combinations of which are states: the schema of the largest tables."""
    schema = obj({letter: {"type": "integer"} for letter in "abc"})
    context = ponder.Context(lm_of(PIECES), 12)
    assert repr(ponder.json_schema(schema).bind(context)).endswith("engine='automaton')")
    monkeypatch.setattr(automaton, "TABLE_LIMIT", 5000)
    assert repr(ponder.json_schema(schema).bind(context)).endswith("engine='host')")
    with pytest.raises(ValueError, match="above the limit"):
        ponder.json_schema(schema, "automaton").bind(context)


def test_both_engines_agree_where_both_hold_a_schema():
    schema = obj(
        {"a": {"type": "integer"}, "b": {"enum": ["x", None]}}, required=["a"], additionalProperties=False
    )
    values = [
        {"a": 1},
        {"a": -2, "b": "x"},
        {"a": 1, "b": None},
        {"b": None},
        {"a": "x"},
        {"a": 1, "b": 2},
        {},
        1,
    ]
    texts = [json.dumps(value, separators=s) for value in values for s in ((", ", ": "), (",", ":"))]
    table, initial, finals = ponder.json_schema(schema).language.byte_automaton()
    hosted = weights(schema, texts)
    for text in texts:
        state = initial
        for byte in text.encode():
            state = table[state, byte] if state >= 0 else -1
        assert (state in finals) == hosted[text], text
    assert sum(hosted.values()) == 6


def test_white_space():
    schema = {"type": "array", "items": NULL, "uniqueItems": True}
    for whitespace, wide, narrow in (("", False, True), (" ?", True, True), ("[ \n]{0,4}", True, True)):
        found = weights(schema, ["[ null ]", "[null]"], whitespace=whitespace)
        assert found == {"[ null ]": wide, "[null]": narrow}


def test_the_repr_names_the_engine_and_what_is_judged_late():
    context = ponder.Context(lm_of(PIECES), 12)
    for schema, shown in (
        (NULL, '{"type": "null"}, engine=\'automaton\')'),
        ({"not": NULL, "uniqueItems": True}, "engine='host', late=['not', 'uniqueItems'])"),
        ({"uniqueItems": False, "minItems": 1}, "engine='host')"),
        ({"format": "iri"}, "engine='host', unchecked=['format iri'])"),
        ({"minProperties": 1}, "engine='host')"),
    ):
        assert repr(ponder.json_schema(schema).bind(context)).endswith(shown)
    assert repr(ponder.json_schema({"not": NULL})) == 'json_schema({"not": {"type": "null"}})'


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, r"at #/type: expected a valid JSON schema; \"foo\": .*"),
        ({"type": "string", "maxLength": -1}, "at #/maxLength: .*-1 is less than the minimum"),
        ({"not": {"required": "a"}}, "at #/not/required: .*'a' is not of type 'array'"),
        ({"not": {"$ref": "https://example.org/s"}}, r"\$ref: there is no 'https://example.org/s'"),
        ({"$ref": "#/$defs/none"}, r"\$ref: there is no '#/\$defs/none' in the schema"),
        ({"allOf": [{"$ref": "#"}]}, "a reference leads back to itself, without end"),
        ({"not": {"pattern": "("}}, "at #/not/pattern: '\\(' is no pattern: missing \\)"),
        ({"$schema": "https://example.org/mine", "not": NULL}, r"at #/\$schema: expected a draft"),
    ],
    ids=str,
)
def test_invalid_schemas_are_refused_by_name(schema, message):
    for engine in ("auto", "host"):
        with pytest.raises(ValueError, match=rf"json_schema\(schema\): {message}"):
            ponder.json_schema(schema, engine)


def test_unknown_keywords_warn():
    with pytest.warns(UserWarning, match="without effect: maxLenght"):
        ponder.json_schema({"type": "string", "maxLenght": 3})
    ponder.json_schema({"type": "string", "x-order": 3})
    with pytest.raises(ValueError, match="maxLenght: not supported"):
        ponder.json_schema({"type": "string", "maxLenght": 3}, "automaton")


def test_older_drafts_by_their_schema():
    draft7 = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "items": [{"type": "integer"}],
        "additionalItems": NULL,
    }
    assert weights(draft7, ["[1,null]", "[1,1]"]) == {"[1,null]": True, "[1,1]": False}


def test_engines_are_checked():
    for build in (ponder.json_schema, ponder.regex):
        with pytest.raises(
            ValueError, match=r"\(engine\): expected 'auto', 'automaton' or 'host', got 'gpu'"
        ):
            build("{}", engine="gpu")


@pytest.mark.parametrize("package", ["jsonschema", "llguidance"])
def test_names_the_extra_to_install(monkeypatch, package):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    schema = {"not": {"const": package}}  # judged and guided for the first time
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'ponder-ppl\[grammar\]'"):
        ponder.json_schema(schema).bind(ponder.Context(lm_of(PIECES), 4))
    ponder.json_schema(NULL).bind(ponder.Context(lm_of(PIECES), 4))  # the automaton needs neither


PYDANTIC = {  # as pydantic writes the schemas of fields
    "bytes": ({"format": "binary", "type": "string"}, '"ab"', "1"),
    "set[int]": ({"items": {"type": "integer"}, "type": "array", "uniqueItems": True}, "[1,2]", "[1,1]"),
    "tuple[int, str]": ({"maxItems": 2, "minItems": 2, "type": "array",
                         "prefixItems": [{"type": "integer"}, {"type": "string"}]}, '[1,"a"]', "[1]"),
    "dict[str, int]": ({"additionalProperties": {"type": "integer"}, "minProperties": 1, "type": "object"},
                       '{"a":1}', "{}"),
    "UUID4": ({"format": "uuid4", "type": "string"}, '"01234567-89ab-4def-8123-456789abcdef"',
              '"01234567-89ab-1def-8123-456789abcdef"'),
    "IPv4Network": ({"format": "ipv4network", "type": "string"}, '"1.2.3.0"', '"1.2"'),
    "email": ({"format": "email", "type": "string"}, '"a.b"', '"a.b"'),
    "multiple_of": ({"multipleOf": 5, "type": "integer"}, "15", "12"),
    "interval": ({"exclusiveMaximum": 1, "exclusiveMinimum": 0, "type": "number"}, "0.5", "1"),
    "Decimal": ({"anyOf": [{"type": "number"}, {"type": "string",
                "pattern": "^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$"}]}, '"1.50"', '"-"'),
    "timedelta": ({"format": "duration", "type": "string"}, "", '"1"'),
    "discriminated": ({"discriminator": {"propertyName": "k"}, "oneOf": [
        obj({"k": {"const": "a"}, "n": {"type": "integer"}}, required=["k", "n"]),
        obj({"k": {"const": "b"}}, required=["k"])]}, '{"k":"b"}', '{"k":"a"}'),
    "Node": ({"$ref": "#/$defs/Node", "$defs": {"Node": obj({"v": {"type": "integer"}, "n": {
                "anyOf": [{"$ref": "#/$defs/Node"}, NULL], "default": None}}, required=["v"])}},
             '{"v":1,"n":{"v":2,"n":null}}', '{"v":1,"n":{}}'),
}  # fmt: skip


@pytest.mark.parametrize("name", PYDANTIC)
def test_fields_of_pydantic(name):
    schema, right, wrong = PYDANTIC[name]
    texts = [text for text in (right, wrong) if text]
    found = weights(schema, texts)
    assert name == "email" or found == {text: text == right for text in texts}
    ponder.json_schema(schema).bind(ponder.Context(lm_of(PIECES), 64))


def test_one_guide_serves_all_programs_and_equal_schemas_compile_once():
    first, second = (HostedSchema('{"not": {"type": "null"}}', " ?") for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert _guide(first.schema, " ?") is _guide(second.schema, " ?")
    context = ponder.Context(lm_of(PIECES), 4)
    one, other = (ponder.json_schema({"not": NULL}).bind(context).matchers for _ in range(2))
    assert one == other and hash(one) == hash(other) and isinstance(one, Matchers)
    assert one != ponder.json_schema({"not": {"const": 1}}).bind(context).matchers


def test_verdicts_of_formats():
    judge = {
        name: SchemaJudge.of({"format": name})
        for name in ("date", "time", "duration", "email", "uri", "regex")
    }
    for name, right, wrong in (
        ("date", "2024-02-29", "2023-02-29"),
        ("time", "12:00:00Z", "12:00:00"),
        ("duration", "P1DT2H", "PT"),
        ("email", "a.b@c.de", "a@b@c"),
        ("uri", "https://a.b/c?d", "//a b"),
        ("regex", "^a$", "("),
    ):
        assert judge[name](json.dumps(right)) and not judge[name](json.dumps(wrong)), name
        assert judge[name]("1")  # of strings only


def test_every_short_text_agrees_with_the_judge():
    """The guide is no narrower than the schema: all texts of up to five characters over an alphabet.

    But for -0, which is no canonical spelling.
    """
    schema = {"type": "array", "items": {"type": "integer", "minimum": -1}, "contains": {"const": 0}}
    bound = ponder.json_schema(schema, whitespace="").bind(ponder.Context(lm_of(PIECES), 7))
    judge = SchemaJudge.of(schema)
    for length in range(6):
        for letters in itertools.product("[],10-", repeat=length):
            text = "".join(letters)
            assert follows(bound.matchers, spell(text), 7) == (judge(text) and "-0" not in text), text


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"multipleOf": 0.01}, ["19.99", "4.35", "0.07", '"a"'], ["4.355", "1e-3"]),
        ({"multipleOf": 0.1}, ["0.3"], ["0.35"]),
        ({"not": {"multipleOf": 0.5}}, ["0.3"], ["1.5", "9" * 400, "1e400"]),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "multipleOf": 0.1}, ["0.3"], ["0.35"]),
    ],
)
def test_multiples_are_those_of_the_decimals_that_are_written(schema, right, wrong):
    judge = SchemaJudge.of(schema)
    assert all(map(judge, right)) and not any(map(judge, wrong))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"const": 1234567890123456789}, "1234567890123456789"),
        ({"enum": [9007199254740993, "a"]}, "9007199254740993"),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "$ref": "#/definitions/a",
                "maxLength": 1,
                "definitions": {"a": {"type": "string"}},
            },
            '"abc"',
        ),
    ],
)
def test_what_the_judge_takes_the_guide_can_write(schema, text):
    pieces = (*(bytes([byte]) for byte in sorted(set(text.encode()))), b"")
    lm = TableLM(
        jnp.zeros((len(pieces), len(pieces))),
        eos_token_ids=(len(pieces) - 1,),
        tokenizer=PieceTokenizer(pieces),
    )
    bound = ponder.json_schema(schema, engine="host").bind(ponder.Context(lm, len(text) + 1))
    tokens = np.array([[pieces.index(bytes([byte])) for byte in text.encode()]], np.int32)
    state = bound.init(1)
    for column in tokens.T:
        state = bound.update(state, jnp.asarray(column), jnp.ones(1, bool))
    assert float(bound.log_complete(state)[0]) == 0
