"""Summaries: right numbers, readable text, nothing unescaped."""

import functools
import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.arguments import escape, shorten
from ponder.models import PieceTokenizer, TableLM
from ponder.posterior.display import heaviest, percent

PIECES = (b"<b>x</b> & ", b"line\n", b"\x1b[31m", b"plain ", b"")


@pytest.fixture
def make(make_posterior):
    return functools.partial(make_posterior, pieces=PIECES)


def test_summary_tells_the_facts(make):
    posterior = make(
        [0, 3, 3, 1],
        [0.5, 0.125, 0.375, 0.0],
        tokens_generated=jnp.int32(40),
        tokens_discarded=jnp.int32(10),
        resampled=jnp.array([True]),
    )
    text = posterior.summary()
    assert text.splitlines()[0] == "Posterior by smc: 4 particles, 2 distinct traces"
    assert "log evidence -1.500, ESS 2.46 (62% of 4)" in text
    assert "40 tokens generated, 10 discarded (25%), 1 resampling, 1 step" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["50.00%", "50.00%"]
    assert "line" not in text  # a trace without weight is not in the posterior


def test_summary_does_not_claim_health_that_the_genealogy_denies(make):
    """Equal weights, and yet all from one particle: the effective sample size alone would say 100%."""
    rows = [[0, 1], [0, 3], [0, 3], [0, 1]]
    history = {
        "ess": np.array([3.5, 4.0], np.float32),
        "resampled": np.array([True, False]),
        "ancestors": np.array([[2, 2, 2, 2], [0, 1, 2, 3]], np.int32),
    }
    text = make(rows, [0.25] * 4, **history).summary()
    assert "ESS 4.00 (100% of 4)" in text and "ancestors left: 1 of 4 at step 1, 4 at step 2" in text
    assert "ONE PARTICLE" not in text
    history["ancestors"] = np.array([[0, 1, 1, 3], [2, 2, 2, 2]], np.int32)
    assert "ancestors left: 1 of 4 up to step 2\n" in make(rows, [0.25] * 4, **history).summary()
    history["ess"] = np.array([1.02, 4.0], np.float32)
    text = make(rows, [0.25] * 4, **history).summary()
    assert "ONE PARTICLE carries the evidence: at step 1 the effective sample size was 1.02 of 4" in text
    history["resampled"] = np.array([False, False])
    assert "ancestors" not in make(rows, [0.25] * 4, **history).summary()
    assert "ONE PARTICLE" not in make(rows, [0.25] * 4, origin="merged", **history).summary()


def test_summary_without_statistics_or_evidence(make):
    text = make([0, 1], [0.5, 0.5], log_evidence=jnp.nan).summary()
    assert "log evidence none" in text
    assert "None" not in text and "nan" not in text
    assert "discarded" not in text and "resampling" not in text


@pytest.mark.parametrize(("flag", "word"), [("degenerate", "DEGENERATE"), ("invalid", "INVALID")])
def test_summary_says_what_went_wrong(make, flag, word):
    assert word in make([0], [1.0], **{flag: jnp.bool_(True)}).summary()
    assert word not in make([0], [1.0], **{flag: jnp.bool_(False)}).summary()


def test_degenerate_run_has_log_evidence_minus_infinity():
    lm = TableLM(jnp.zeros((5, 5)), eos_token_ids=(4,), tokenizer=PieceTokenizer(PIECES))
    never = ponder.text(lambda texts: [-np.inf] * len(texts))
    program = ponder.Generation(lm, [0], max_new_tokens=2, potential=never)
    with pytest.warns(RuntimeWarning, match="every particle has weight zero"):
        posterior = ponder.inference.smc(program, num_particles=3).run(jax.random.key(0))
    assert "log evidence -inf" in posterior.summary()
    assert "DEGENERATE" in posterior.summary()


def test_each_trace_is_one_line_without_control_characters(make):
    lines = make([[1, 2, 1], [3]], [0.9, 0.1]).summary().splitlines()
    assert lines[-2].endswith(r"line\n\x1b[31mline\n")
    assert all(line.isprintable() for line in lines)


def test_the_lightest_traces_are_summed_up(make):
    posterior = make([0, 1, 2, 3], [0.4, 0.3, 0.2, 0.1])
    lines = posterior.summary(num_traces=2).splitlines()
    assert lines[-1].split() == ["30.00%", "in", "2", "more", "traces"]
    found = heaviest(posterior, 2)
    assert [row.weight for row in found.rows] == pytest.approx([0.4, 0.3])
    assert (found.num_distinct, found.rest) == (4, pytest.approx(0.3))


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3"])
def test_num_traces_is_checked(make, wrong):
    with pytest.raises(ValueError, match="num_traces: expected an integer >= 1, got"):
        make([0], [1.0]).summary(wrong)


def test_a_batch_of_posteriors_is_refused_by_name(make):
    one = make([0, 1], [0.5, 0.5])
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    with pytest.raises(ValueError, match="got a batch of shape"):
        batch.summary()
    assert "tokens (2, 2, 1)" in batch._repr_html_()


def test_shorten_cuts_the_middle():
    text = "".join(chr(97 + i % 26) for i in range(200))
    short = shorten(text, 50)
    assert len(short) == 50
    head, tail = short.split(" … ")
    assert text.startswith(head) and text.endswith(tail)
    assert shorten("short", 50) == "short"


def test_escape_leaves_readable_text_alone():
    assert escape("naïve 中文 $x$ \\n") == "naïve 中文 $x$ \\n"
    assert escape("a\tb\r\u202e\x00") == r"a\tb\r\u202e\x00"
    assert escape("a\nb\t", keep="\n") == "a\nb\\t"


def test_percent_never_shows_weight_as_zero():
    assert [percent(w) for w in (0.0, 1e-9, 4.9e-5, 0.00012, 1.0)] == [
        "0.00%",
        "<0.01%",
        "<0.01%",
        "0.01%",
        "100.00%",
    ]


class _Collector(html.parser.HTMLParser):
    """Collects tags and text, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_escapes_traces_and_is_well_formed(make):
    posterior = make([0, 3, 2], [0.6, 0.39999, 0.00001])
    parsed = _Collector()
    page = posterior._repr_html_()
    parsed.feed(page)
    assert not parsed.open
    assert "b" not in parsed.tags  # the trace's <b> is text
    assert "<b>x</b> & " in parsed.text
    assert "\x1b" not in page
    assert "width:60.0px" in page
    assert "log evidence -1.500" in parsed.text
