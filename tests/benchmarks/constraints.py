"""How exactly schemas and patterns are held: the JSON Schema test suite, and a collection of patterns.

    python tests/benchmarks/constraints.py --schemas DIRECTORY    # *.json of the suite, one draft
    python tests/benchmarks/constraints.py --patterns FILE.csv    # one pattern a row, after a header

Every schema and pattern is bound to a model whose tokens are the 256 bytes. Accepted: it is bound. Sound: no
invalid instance has weight, and no text that random walks come by and that the oracle refuses. Complete:
every valid instance has weight in its canonical spelling (in some order of its properties); every match that
a random search finds has weight. Beyond the suite's own verdicts, the oracle of schemas is jsonschema; that
of patterns is Python's re where that knows the syntax, else the regex package. Never a test.
"""

import argparse
import collections
import csv
import functools
import itertools
import json
import random
import re
import statistics
import time
import warnings
from pathlib import Path

LIMIT = 96  # bytes of a text
TEXTS = 96  # most matches of a pattern that are tried
PRINTABLE = bytes(range(32, 127)) + b"\n"


def context():
    """Return the context of a program whose tokens are bytes, and EOS."""
    import jax

    import ponder
    from ponder.models import PieceTokenizer, TableLM

    pieces = (*(bytes([byte]) for byte in range(256)), b"")
    lm = TableLM.random(
        jax.random.key(0), 257, order=1, eos_token_ids=(256,), tokenizer=PieceTokenizer(pieces)
    )
    return ponder.Context(lm, LIMIT)


def reader(bound):
    """Return a function from prefixes, as bytes, to pairs: may it go on, and has it weight as it is.

    It reads what the potential holds (tables, matchers, judges) without JAX, which would compile for each.
    """
    import numpy as np

    if hasattr(bound, "automaton"):
        tables = bound.automaton
        states, columns = np.asarray(tables.next_state), np.asarray(tables.token_class)
        distance = np.asarray(tables.distance)

        def read(prefix):
            state = tables.initial
            for byte in prefix:
                state = states[state, columns[byte]] if state >= 0 else -1
            return state >= 0 and distance[state] <= LIMIT - len(prefix), state >= 0 and distance[state] == 0

    else:

        @functools.lru_cache(maxsize=10_000)
        def judged(prefix, limit):
            tokens = np.zeros((1, limit), np.int32)
            tokens[0, : len(prefix)] = list(prefix)
            allowed, accepts = bound.matchers(tokens, np.array([len(prefix)]), np.ones(1, bool))
            return allowed[0], bool(accepts[0])

        def read(prefix):
            for end, byte in enumerate(prefix):
                if not judged(prefix[:end], LIMIT)[0][byte // 8] >> byte % 8 & 1:
                    return False, False
            return True, judged(prefix, len(prefix))[1]  # without room for more, no mask is made

    return read


def walk(read, rng, num_steps):
    """Yield texts with weight that are met along a random walk through prefixes with weight."""
    prefix = b""
    for _ in range(num_steps):
        found = {byte: read(prefix + bytes([byte])) for byte in PRINTABLE}
        yield from ((prefix + bytes([byte])).decode() for byte, (_, complete) in found.items() if complete)
        alive = [byte for byte, (may_go_on, _) in found.items() if may_go_on]
        if not alive:
            return
        prefix += bytes([rng.choice(alive)])


def spellings(value, most=120):
    """Spell a value canonically, in up to `most` orders of its properties."""

    def orders(value):
        if isinstance(value, dict):
            for names in itertools.permutations(value):
                for parts in itertools.product(*(list(orders(value[name])) for name in names)):
                    yield dict(zip(names, parts, strict=True))
        elif isinstance(value, list):
            yield from (list(parts) for parts in itertools.product(*(list(orders(part)) for part in value)))
        else:
            whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
            yield int(value) if whole else value

    return [json.dumps(found, ensure_ascii=False) for found in itertools.islice(orders(value), most)]


def judge_schema(schema, tests, bound, rng, options):
    """Return faults of soundness, and for each valid instance whether it has weight."""
    from ponder.potentials.schema_judge import SchemaJudge

    spelt = [(test["valid"], spellings(test["data"])) for test in tests]
    read = reader(bound)

    def weighty(texts):
        return any(len(text.encode()) <= LIMIT and read(text.encode())[1] for text in texts)

    faults = [texts[0] for valid, texts in spelt if not valid and weighty(texts)]
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    judge = SchemaJudge.of({**schema, **draft} if isinstance(schema, dict) else schema)
    for _ in range(options.walks):
        faults += [text for text in walk(read, rng, options.steps) if not judge(text)]
    short = [texts for valid, texts in spelt if valid and len(texts[0].encode()) <= LIMIT]
    return faults, [weighty(texts) for texts in short]


def schemas(options):
    """Print what becomes of every schema of the suite."""
    import ponder

    at, rng = context(), random.Random(0)
    engines, seconds, instances = collections.Counter(), [], []
    sound = complete = total = 0
    for path in sorted(Path(options.schemas).glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            total += 1
            place = f"{path.stem}: {group['description']}"
            start = time.perf_counter()
            try:
                bound = ponder.json_schema(group["schema"], options.engine).bind(at)
            except ValueError as error:
                engines["refused"] += 1
                print(f"refused   {place}: {str(error)[:100]}")
                continue
            seconds.append(time.perf_counter() - start)
            engines["host" if "engine='host'" in repr(bound) else "automaton"] += 1
            faults, valid = judge_schema(group["schema"], group["tests"], bound, rng, options)
            instances += valid
            sound += not faults
            complete += all(valid)
            for text in faults[:1]:
                print(f"unsound   {place}: {text[:80]}")
            if not all(valid):
                print(f"narrow    {place}: {valid.count(False)} of {len(valid)} valid instances")
    accepted = total - engines["refused"]
    print(f"{total} schemas: accepted {accepted}, sound {sound}, complete {complete}; {dict(engines)}")
    print(f"valid instances with weight: {sum(instances)} of {len(instances)}")
    report(seconds, "schema")


def oracle(pattern):
    """Return what tells whether a text matches in full, and its name."""
    import regex

    from ponder.potentials.pattern_syntax import SETS, features

    sets = any(feature.kind in SETS for feature in features(pattern))
    if not sets:
        try:
            return re.compile(pattern).fullmatch, "re"
        except re.error:
            pass
    compiled = regex.compile(pattern, regex.V1 if sets else regex.V0)
    return (lambda text: compiled.fullmatch(text, timeout=2)), "regex"


def candidates(pattern, rng, count):
    """Yield texts over the characters of a pattern and some others: all short ones, then random ones."""
    letters = [c for c in dict.fromkeys(re.sub(r"\\.|\(\?[^)]*", "", pattern)) if c.isalnum() or c in " -./:"]
    letters = (rng.sample(letters, min(4, len(letters))) + list("ab1Aé-Ω("))[:9]
    for length in range(4):
        yield from map("".join, itertools.product(letters, repeat=length))
    for _ in range(count):
        yield "".join(rng.choice(letters) for _ in range(rng.randint(4, 12)))


def patterns(options):
    """Print what becomes of every pattern."""
    import ponder

    with open(options.patterns, newline="", encoding="utf-8") as file:
        found = list(dict.fromkeys(row[0] for row in csv.reader(file) if row))[1:]
    at, rng = context(), random.Random(0)
    engines, oracles, seconds = collections.Counter(), collections.Counter(), []
    sound = complete = matched = 0
    for pattern in found:
        matches, name = oracle(pattern)
        start = time.perf_counter()
        try:
            bound = ponder.regex(pattern, options.engine).bind(at)
        except ValueError as error:
            engines["refused"] += 1
            print(f"refused   {pattern[:60]!r}: {str(error)[-100:]}")
            continue
        seconds.append(time.perf_counter() - start)
        shown = repr(bound)
        engines["host, judged" if "judge='regex'" in shown else shown.rsplit("engine='")[-1][:-2]] += 1
        oracles[name] += 1
        read = reader(bound)
        written = [text for _ in range(options.walks) for text in walk(read, rng, options.steps)]
        wanted = [text for text in candidates(pattern, rng, 2000) if matches(text)]
        faults = [text for text in written if not matches(text)]
        narrow = [t for t in rng.sample(wanted, min(TEXTS, len(wanted))) if not read(t.encode())[1]]
        sound, complete = sound + (not faults), complete + (not narrow)
        matched += bool(written or wanted)
        for word, texts in (("unsound", faults), ("narrow", narrow)):
            if texts:
                print(f"{word:9} {pattern[:60]!r}: {texts[0]!r}")
    accepted = len(found) - engines["refused"]
    print(f"{len(found)} patterns: accepted {accepted}, sound {sound}, complete {complete}; {dict(engines)}")
    print(f"matches were found of {matched}; oracles: {dict(oracles)}")
    report(seconds, "pattern")


def report(seconds, what):
    """Print what building took."""
    print(
        f"seconds a {what}: median {statistics.median(seconds):.3f}, mean {statistics.mean(seconds):.3f}, "
        f"most {max(seconds):.2f}"
    )


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schemas", help="folder of the JSON Schema test suite with the files of one draft")
    parser.add_argument("--patterns", help="CSV file whose first column holds the patterns")
    parser.add_argument("--engine", default="auto", choices=("auto", "automaton", "host"))
    parser.add_argument("--walks", type=int, default=2, help="random walks for each")
    parser.add_argument("--steps", type=int, default=16, help="bytes of a walk")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.schemas:
        schemas(options)
    if options.patterns:
        patterns(options)


if __name__ == "__main__":
    main()
