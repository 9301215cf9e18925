"""Enumeration against a brute force that shares no code with the library."""

import itertools
import re

import jax
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.models import TableLM

SCORES = [0.9, -0.8, 0.4, -0.3]
LETTERS = "abc"


def brute_force(lm, overflow="truncate", temperature=1.0, stop=None, log_phi=lambda tokens: 0.0):
    """All traces of at most four tokens after the prompt (1, 2), by plain loops in float64."""
    logits = np.asarray(lm.table, float) / temperature
    result = {}
    for length in range(1, 5):
        for tokens in itertools.product(range(4), repeat=length):
            text = ["".join(LETTERS[t] for t in tokens[:i] if t != 3) for i in range(length + 1)]
            ended = [i for i in range(1, length + 1) if tokens[i - 1] == 3 or (stop and stop in text[i])]
            if ended and ended[0] < length:
                continue  # ends earlier
            if not ended and (length < 4 or overflow == "force_eos"):
                continue  # unfinished
            history, log_p = [1, 2], 0.0
            for token in tokens:
                row = logits[history[-2], history[-1]]
                log_p += row[token] - np.logaddexp.reduce(row)
                history.append(token)
            value = log_p + log_phi(tokens)
            if value > -np.inf:
                result[tokens] = value
    return result


def total(tokens):
    state = sum(SCORES[t] for t in tokens)
    return state - 0.4 * np.sin(3.0 * state)


def fits(tokens):
    return 0.0 if re.fullmatch("(a|bc)*", "".join(LETTERS[t] for t in tokens if t != 3)) else -np.inf


def squared(lm):
    prior = brute_force(lm)
    return lambda tokens: prior[tokens]


CASES = {
    "prior": ({}, None, {}),
    "force_eos": ({"overflow": "force_eos"}, None, {"overflow": "force_eos"}),
    "temperature": ({"temperature": 0.7}, None, {"temperature": 0.7}),
    "stop": ({"stop": "ab"}, None, {"stop": "ab"}),
    "stop, force_eos": (
        {"stop": "ab", "overflow": "force_eos"},
        None,
        {"stop": "ab", "overflow": "force_eos"},
    ),
    "scores": ({}, "scores", {"log_phi": total}),
    "regex": ({}, "regex", {"log_phi": fits}),
    "product": ({}, "product", {"log_phi": lambda t: fits(t) + 0.5 * total(t)}),
    "power": ({}, "power", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_exact_is_the_brute_force(toy, scores, case):
    settings, name, reference = CASES[case]
    potential = {
        None: None,
        "scores": scores,
        "regex": ponder.regex("(a|bc)*"),
        "product": ponder.regex("(a|bc)*") * scores**0.5,
        "power": ponder.power(2.0),
    }[name]
    if name == "power":
        reference = {"log_phi": squared(toy)}
    expected = brute_force(toy, **reference)
    model = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=potential, **settings)
    found = inference.exact(model).run()
    traces = {
        tuple(row[:n].tolist()): float(a) + float(b)
        for row, n, a, b in zip(
            np.asarray(found.tokens),
            np.asarray(found.lengths),
            found.log_prior,
            found.log_potential,
            strict=True,
        )
    }
    assert traces.keys() == expected.keys()
    np.testing.assert_allclose([traces[t] for t in expected], list(expected.values()), atol=2e-5)
    log_evidence = np.logaddexp.reduce(list(expected.values()))
    assert float(found.log_evidence) == pytest.approx(log_evidence, abs=1e-5)
    assert found.weights.sum() == pytest.approx(1.0)


def test_without_potential_the_prior_sums_to_one(toy):
    found = inference.exact(ponder.Generation(toy, [0], max_new_tokens=4)).run(jax.random.key(0))
    assert float(found.log_evidence) == pytest.approx(0.0, abs=1e-5)


def test_refuses_politely():
    lm = TableLM.random(jax.random.key(0), 50, order=1)
    with pytest.raises(ValueError, match="50 tokens to the power of 6"):
        inference.exact(ponder.Generation(lm, [0], max_new_tokens=6))
    with pytest.raises(TypeError, match="program"):
        inference.exact(lm)


def test_no_posterior_is_an_error(toy):
    model = ponder.Generation(toy, [0], max_new_tokens=2, potential=ponder.tokens(allow=[], forbid=[3]))
    with pytest.raises(ValueError, match="no trace"):
        inference.exact(model).run()
