import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models import PieceTokenizer
from ponder.posterior.posterior import Posterior, Stats, Trace
from ponder.testing import MAX_Z

TOKENIZER = PieceTokenizer((b"a", b"b", b"c", b""))
ROWS = ["ab", "c", "ab", "aab", "c"]  # the second "c" has no EOS and no weight
WEIGHTS = np.array([0.3, 0.1, 0.2, 0.4, 0.0])


def make(tokenizer=TOKENIZER, weights=WEIGHTS):
    tokens = np.full((5, 4), 3, np.int32)
    tokens[0, :2] = tokens[2, :2] = [0, 1]
    tokens[1, 0] = tokens[4, 0] = 2
    tokens[3, :3] = [0, 0, 1]
    tokens[4, 1:] = 2  # beyond the length, where anything may stand
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    return Posterior(
        tokens=jnp.asarray(tokens),
        lengths=jnp.array([3, 2, 3, 4, 1], jnp.int32),
        log_weights=jnp.asarray(log_weights, jnp.float32),
        log_evidence=jnp.float32(-1.5),
        log_prior=jnp.array([-3.0, -1.0, -3.0, -4.0, -0.5], jnp.float32),
        log_potential=jnp.array([0.5, -1.8, 0.5, 0.0, 0.0], jnp.float32),
        stats=Stats(
            num_steps=jnp.int32(4),
            ess=jnp.full(4, 3.0),
            resampled=jnp.zeros(4, bool),
            ancestors=jnp.broadcast_to(jnp.arange(5), (4, 5)),
            num_tokens=jnp.ones((4, 5), jnp.int32),
            tokens_generated=jnp.int32(13),
        ),
        tokenizer=tokenizer,
        method="smc",
    )


def test_text():
    assert make().text == ROWS
    assert len(make()) == 5
    assert make(tokenizer=None).text == ["0 1 3", "2 3", "0 1 3", "0 0 1 3", "2"]


def test_weights_and_ess():
    posterior = make()
    np.testing.assert_allclose(posterior.weights, WEIGHTS, atol=1e-7)
    assert posterior.weights.dtype == np.float64 and posterior.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert isinstance(posterior.ess, float)
    assert posterior.ess == pytest.approx(1 / (0.09 + 0.01 + 0.04 + 0.16), rel=1e-6)
    assert make(weights=np.full(5, 0.2)).ess == pytest.approx(5.0, rel=1e-6)
    assert make(weights=np.eye(5)[2]).ess == pytest.approx(1.0)


def test_expectation():
    posterior = make()
    assert posterior.expectation(len) == pytest.approx(0.3 * 2 + 0.1 + 0.2 * 2 + 0.4 * 3, rel=1e-6)
    assert posterior.expectation(lambda t: "b" in t) == pytest.approx(0.9, rel=1e-6)
    assert posterior.expectation(lambda t: 7.0) == pytest.approx(7.0)
    counts = posterior.expectation(lambda t: [t.count("a"), t.count("c")])
    np.testing.assert_allclose(counts, [0.3 + 0.2 + 0.8, 0.1], rtol=1e-6)
    matrix = posterior.expectation(lambda t: len(t) * np.eye(2))
    np.testing.assert_allclose(matrix, 2.3 * np.eye(2), rtol=1e-6)


def test_expectation_of_tokens():
    """f is given the trace itself, with EOS and without padding."""
    seen = []
    value = make().expectation(lambda tokens: seen.append(tokens.tolist()) or len(tokens), on="tokens")
    assert value == pytest.approx(0.5 * 3 + 0.1 * 2 + 0.4 * 4, rel=1e-6)
    assert seen == [[0, 1, 3], [2, 3], [0, 1, 3], [0, 0, 1, 3], [2]]
    with pytest.raises(ValueError, match="on: expected 'text' or 'tokens', got 'words'"):
        make().expectation(len, on="words")
    with pytest.raises(TypeError, match="f: expected a function of a trace, got 3"):
        make().expectation(3)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_expectation_ignores_traces_without_weight(value):
    posterior = dataclasses.replace(make(), lengths=jnp.array([3, 2, 3, 4, 2]))  # the last is now "cc"
    assert posterior.expectation(lambda t: value if t == "cc" else 1.0) == pytest.approx(1.0)
    # Infinities of traces with weight stay.
    assert not np.isfinite(posterior.expectation(lambda t: value if t == "c" else 1.0))


def test_sample():
    posterior = make()
    drawn = posterior.sample(jax.random.key(0), 5000)
    assert isinstance(drawn, Posterior) and len(drawn) == 5000
    np.testing.assert_allclose(drawn.weights, 1 / 5000)
    assert float(jax.nn.logsumexp(drawn.log_weights)) == pytest.approx(0.0, abs=1e-4)
    texts, host = np.array(drawn.text), jax.tree.map(np.asarray, drawn)
    for text, weight in (("ab", 0.5), ("c", 0.1), ("aab", 0.4)):
        z = ((texts == text).mean() - weight) / np.sqrt(weight * (1 - weight) / 5000)
        assert abs(z) < MAX_Z
    assert (host.lengths[texts == "c"] == 2).all()  # never the row without weight
    # What is told of a trace goes with it; what is told of a particle of the run does not.
    for text, log_prior, log_potential in (("ab", -3.0, 0.5), ("aab", -4.0, 0.0)):
        assert (host.log_prior[texts == text] == log_prior).all()
        assert (host.log_potential[texts == text] == log_potential).all()
    assert drawn.stats.ancestors is None and drawn.stats.num_tokens is None
    assert drawn.log_evidence == posterior.log_evidence and drawn.method == "smc"
    again = posterior.sample(jax.random.key(0), 5000)
    np.testing.assert_array_equal(drawn.tokens, again.tokens)
    for n in (0, 2.5, True, "2", None):
        with pytest.raises(ValueError, match=f"n: expected an integer >= 1, got {n!r}"):
            posterior.sample(jax.random.key(0), n)
    with pytest.raises(TypeError, match="key: expected a single PRNG key"):
        posterior.sample(0, 2)
    assert len(posterior.sample(jax.random.key(0), np.int64(2))) == 2


def test_mode():
    """The highest p Φ, which is neither the largest weight nor the largest p, of the traces with weight."""
    trace = make().mode()
    assert isinstance(trace, Trace)
    assert trace.text == "ab"
    assert trace.tokens.tolist() == [0, 1, 3]
    assert trace.log_weight == pytest.approx(np.log(0.3), abs=1e-6)
    assert make(weights=np.array([0, 0.5, 0, 0.5, 0])).mode().text == "c"
    assert make(tokenizer=None).mode().text == "0 1 3"


def test_unique():
    posterior = make()
    merged = posterior.unique()
    # By tokens, not by text: the last "c" has not ended with EOS.
    assert merged.text == ["ab", "aab", "c", "c"]
    assert merged.lengths.tolist() == [3, 4, 2, 1]
    np.testing.assert_allclose(merged.weights, [0.5, 0.4, 0.1, 0.0], atol=1e-6)
    assert float(merged.log_weights[-1]) == -np.inf
    assert float(jax.nn.logsumexp(merged.log_weights)) == pytest.approx(0.0, abs=1e-5)
    np.testing.assert_array_equal(merged.log_prior, [-3.0, -4.0, -1.0, -0.5])
    np.testing.assert_array_equal(merged.log_potential, np.float32([0.5, 0.0, -1.8, 0.0]))
    assert merged.unique().text == merged.text
    assert merged.mode().text == posterior.mode().text
    assert merged.expectation(len) == pytest.approx(float(posterior.expectation(len)), rel=1e-6)
    assert merged.log_evidence == posterior.log_evidence


def test_is_a_pytree():
    posterior = make()
    leaves, treedef = jax.tree.flatten(posterior)
    again = jax.tree.unflatten(treedef, leaves)
    assert again.tokenizer is TOKENIZER and again.method == "smc" and again.text == ROWS
    host = jax.tree.map(np.asarray, posterior)
    assert isinstance(host.stats, Stats) and host.stats.log_evidence is None
    assert host.text == ROWS and host.ess == pytest.approx(posterior.ess)
    assert host.unique().text == posterior.unique().text
    shifted = jax.jit(lambda p: dataclasses.replace(p, log_evidence=p.log_evidence + 1))(posterior)
    assert float(shifted.log_evidence) == -0.5 and shifted.summary() != posterior.summary()


def test_a_batch_of_posteriors():
    batch = jax.vmap(lambda x: dataclasses.replace(make(), log_evidence=x))(jnp.arange(3.0))
    assert repr(batch) == "Posterior(smc, tokens (3, 5, 4))"
    one = jax.tree.map(lambda x: x[1], batch)
    assert one.text == ROWS and float(one.log_evidence) == 1.0
    assert "(3, 5, 4)" in batch._repr_html_()
    seen = []
    jax.jit(lambda p: seen.append(repr(p)) or p)(make())  # and traced ones print as well
    assert seen == ["Posterior(smc, tokens (5, 4))"]


def test_summary():
    posterior = make()
    summary = posterior.summary()
    for part in ("smc", "5 particles", "3 distinct traces", "-1.5", "ESS 3.33", "13 tokens"):
        assert part in summary
    lines = [line for line in summary.splitlines() if "%" in line and "ESS" not in line]
    assert [line.split()[0] for line in lines] == ["50.00%", "40.00%", "10.00%"]
    assert [line.split()[2].strip("'\"") for line in lines] == ["ab", "aab", "c"]
    assert "aab" not in posterior.summary(1)
    assert repr(posterior) == posterior.summary(5)
    assert "<table>" in posterior._repr_html_()


def test_summary_of_merged_and_redrawn_traces():
    posterior = make()
    lines = posterior.unique().summary().splitlines()
    assert lines[0] == "Posterior by smc: 4 traces merged from 5 particles, 3 distinct traces"
    assert lines[1] == "log evidence -1.500, ESS of these 4 weights 2.38"
    assert "particles merged" not in repr(posterior) and posterior.origin == ""
    drawn = posterior.sample(jax.random.key(0), 1)
    assert drawn.origin == "drawn from 5 particles"
    assert drawn.unique().origin == "merged from 1 trace drawn from 5 particles"


def test_of_a_run(run, scores):
    """The facts of a real run fit together."""
    posterior = run
    assert len(posterior) == 16 and posterior.tokens.shape == (16, 4)
    assert posterior.weights.sum() == pytest.approx(1.0)
    assert 1 <= posterior.ess <= 16
    assert posterior.unique().weights.max() >= posterior.weights.max()
    table = np.asarray(scores.scores, float)
    value = posterior.expectation(lambda t: table[t].sum() - 0.4 * np.sin(3.0 * table[t].sum()), on="tokens")
    expected = (posterior.weights * np.asarray(posterior.log_potential)).sum()
    assert value == pytest.approx(expected, abs=1e-5)


def test_a_program_that_does_not_tell_its_traces():
    """Such as a state-space model of one's own: no empty texts are passed off as its traces."""
    nothing = jnp.zeros((5, 0), jnp.int32)
    posterior = dataclasses.replace(make(), tokens=nothing, lengths=jnp.zeros(5, jnp.int32), tokenizer=None)
    for ask in (
        lambda p: p.text,
        lambda p: p.mode(),
        lambda p: p.summary(),
        lambda p: p.unique(),
        lambda p: p.answers(len),
        lambda p: p.expectation(len),
        lambda p: p.expectation(len, on="tokens"),
    ):
        with pytest.raises(ValueError, match="got 5 particles without tokens: the program does not tell"):
            ask(posterior)
    assert repr(posterior).startswith("Posterior by smc: 5 particles, no traces told\nlog evidence -1.500")
    assert "no traces told" in posterior._repr_html_()
    assert posterior.ess == pytest.approx(make().ess)
    assert repr(posterior.sample(jax.random.key(0), 2)).startswith("Posterior by smc: 2 traces drawn")


CUTS = [
    ((), ["ab", "c", "ab", "aab", "c"]),
    (("b",), ["a", "c", "a", "aa", "c"]),
    (("b", "ab"), ["", "c", "", "a", "c"]),  # of stops that end together, the longest
    (("c", "a"), ["", "", "", "", ""]),  # the one that is complete first, and what follows it
    ((2, "ab"), ["", "c", "", "a", ""]),  # a stop token is the last one; the second "c" has EOS after it
    (("zebra", 1), ["ab", "c", "ab", "aab", "c"]),
]


@pytest.mark.parametrize(("cut", "texts"), CUTS, ids=str)
def test_stops_that_the_texts_leave_out(cut, texts, tmp_path):
    """Wherever text is shown, and after saving; the tokens keep them."""
    posterior = dataclasses.replace(make(), cut=cut)
    assert posterior.text == texts
    assert posterior.unique().text == [texts[0], texts[3], texts[1], texts[4]]
    assert posterior.mode().text == texts[0] and posterior.mode().tokens.tolist() == [0, 1, 3]
    assert set(posterior.answers(str).answers) == set(texts[:4])
    share = sum(weight for weight, text in zip(WEIGHTS, texts, strict=True) if text == texts[3])
    assert posterior.expectation(lambda text: text == texts[3]) == pytest.approx(share, abs=1e-6)
    assert posterior.summary().splitlines()[4].split()[2:] == ([texts[0]] if texts[0] else [])
    posterior.save(tmp_path / "run")
    for tokenizer in (None, TOKENIZER):
        loaded = Posterior.load(tmp_path / "run", tokenizer)
        assert loaded.text == texts and loaded.cut == cut
        loaded.save(tmp_path / "again")
        assert Posterior.load(tmp_path / "again", TOKENIZER).text == texts
    without = dataclasses.replace(make(tokenizer=None), cut=cut)
    assert without.text[4] == ("" if 2 in cut else "2")
