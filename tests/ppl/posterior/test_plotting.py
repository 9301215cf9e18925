"""Pictures: the genealogy against a hand-made family, and nothing that depends on pyplot or fonts."""

import dataclasses
import io
import itertools
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from ponder.models import PieceTokenizer
from ponder.posterior.genealogy import genealogy
from ponder.posterior.posterior import Posterior, Stats

# Text that matplotlib would take for a formula, that its font lacks, and that is no text at all.
PIECES = (b"cost $5 and $6 ", "中".encode(), b"\x1b\n", b"words ", b"_{\\frac", b"")


def family(weights=(0.5, 0.25, 0.25), lengths=(2, 2, 4)):
    """Three particles, four steps.

    Row 0 ends after 2 steps. After step 3, row 1 dies and becomes a copy of row 0. Row 2 goes on to the end.
    """
    n, t = 3, 4
    ancestors = np.tile(np.arange(n), (t, 1))
    ancestors[2] = [0, 0, 2]
    moved = np.ones((t, n), bool)
    moved[2:, 0] = False
    moved[3, 1] = False
    return Posterior(
        tokens=jnp.asarray([[0, 5, 0, 0], [0, 5, 0, 0], [3, 3, 3, 3]]),
        lengths=jnp.asarray(lengths),
        log_weights=jnp.log(jnp.asarray(weights)),
        log_evidence=jnp.float32(-1.0),
        log_prior=jnp.zeros(n),
        log_potential=jnp.zeros(n),
        stats=Stats(
            num_steps=jnp.int32(t),
            ess=jnp.array([3.0, 2.0, 1.0, 2.5]),
            resampled=jnp.array([False, False, True, False]),
            ancestors=jnp.asarray(ancestors),
            num_tokens=jnp.asarray(moved, jnp.int32),
        ),
        tokenizer=PieceTokenizer(PIECES),
        method="smc",
    )


def lines(segments):
    return sorted(zip(*(np.round(x, 5).tolist() for x in segments), strict=True))


def test_genealogy_of_a_family():
    tree = genealogy(family())
    # (level, row) -> (level, row), with the weight that descends through it.
    assert lines(tree.moves) == [(0, 0, 2, 0, 0.75), (0, 1, 2, 1, 0.0), (0, 2, 4, 2, 0.25)]
    assert lines(tree.waits) == [(2, 0, 3, 1, 0.25)]
    assert lines([tree.end_level, tree.end_row, tree.end_mass]) == [(2, 0, 0.75), (4, 2, 0.25)]
    assert list(zip(tree.copy_level, tree.copy_row, strict=True)) == [(3, 1)]
    assert tree.resampled.tolist() == [3]
    assert tree.num_roots == 2


def test_weightless_particles_have_no_living_ancestors():
    tree = genealogy(family(weights=(1.0, 0.0, 0.0)))
    assert tree.num_roots == 1
    assert [mass for *_, mass in lines(tree.moves)] == [1.0, 0.0, 0.0]
    assert lines(tree.waits) == []


def test_mass_is_conserved_on_a_real_run(run):
    tree = genealogy(run)
    assert len(tree.resampled) > 0
    assert tree.end_mass.sum() == pytest.approx(1.0)
    assert 1 <= tree.num_roots <= 16
    assert tree.num_steps == int(run.stats.num_steps)


def test_plot_genealogy_draws_the_segments():
    ax = family().plot_genealogy()
    assert "2 of the 3" in ax.get_title(loc="left")
    drawn = sum(len(collection.get_segments()) for collection in line_collections(ax))
    assert drawn == 4
    # What died is grey and thin; what lives is wider the heavier it is.
    dead, _, alive = line_collections(ax)
    assert np.ptp(dead.get_colors()[0][:3]) == 0
    assert np.all(np.diff(alive.get_linewidths()) > 0)
    assert isinstance(ax.figure, Figure)


def line_collections(ax):
    from matplotlib.collections import LineCollection

    return [c for c in ax.collections if isinstance(c, LineCollection)]


def test_plot_genealogy_uses_the_axes_it_is_given():
    ax = Figure().add_subplot()
    assert family().plot_genealogy(ax) is ax


def test_posteriors_without_ancestors(exact):
    for posterior in (exact, family().unique(), family().sample(jax.random.key(0), 5)):
        with pytest.raises(ValueError, match="expected one with the ancestors of its particles, got"):
            posterior.plot_genealogy()
        assert len(posterior.plot().axes) == 1


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_plot_draws_any_text_without_warnings(kind):
    tokens = jnp.asarray([[0, 0, 1, 2], [4, 0, 5, 5], [3, 1, 2, 4]])
    posterior = dataclasses.replace(family(), tokens=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = posterior.plot()
        figure.savefig(io.BytesIO(), format=kind)
    labels = figure.subfigs[0].axes[0].get_yticklabels()
    text = "".join(label.get_text() for label in labels)
    assert all(piece in text for piece in ("cost $5 and $6", "_{\\frac", "\\u4e2d", "\\x1b\\n"))
    assert not any(label.get_parse_math() for label in labels)


def test_plot_tells_evidence_sample_size_and_the_rest(make_posterior):
    rows = list(itertools.islice(itertools.product(range(5), repeat=3), 40))
    posterior = make_posterior(
        rows,
        np.full(40, 1 / 40),
        PIECES,
        log_evidence=0.0,
        ess=np.full(3, 40.0, np.float32),
        resampled=np.zeros(3, bool),
        ancestors=np.tile(np.arange(40, dtype=np.int32), (3, 1)),
        num_tokens=np.ones((3, 40), np.int32),
    )
    figure = posterior.plot()
    assert "smc" in figure.get_suptitle() and "ESS 40.0 of 40" in figure.get_suptitle()
    assert "log evidence 0.000" in figure.get_suptitle()
    bars = figure.subfigs[0].axes[0]
    assert "more traces" in bars.get_yticklabels()[-1].get_text()
    assert sum(patch.get_width() for patch in bars.patches) == pytest.approx(1.0, abs=1e-5)


def test_the_pictures_explain_themselves():
    posterior = family()
    stats = posterior.stats._replace(ess_threshold=jnp.float32(0.5))
    ways, size = dataclasses.replace(posterior, stats=stats).plot().subfigs[1].axes
    labels = [text.get_text() for text in ways.get_legend().get_texts()]
    assert labels == [
        "survives (wider: more weight)",
        "died out",
        "finished",
        "copied when finished",
        "resampling",
    ]
    labels = [text.get_text() for text in size.get_legend().get_texts()]
    assert labels == ["resample below 50% of 3", "resampled (1 time)"]
    assert size.get_ylabel() == "particles, of 3" and size.get_ylim()[1] >= 3
    assert list(size.lines[1].get_ydata()) == [1.5, 1.5]
    # What is not there is not explained; importance sampling has no threshold.
    stats = stats._replace(ess_threshold=jnp.float32(0.0), resampled=jnp.zeros(4, bool))
    ways, size = dataclasses.replace(posterior, stats=stats).plot().subfigs[1].axes
    assert "resampling" not in [text.get_text() for text in ways.get_legend().get_texts()]
    assert size.get_legend() is None and len(size.lines) == 1


def test_a_merged_posterior_is_not_taken_for_a_run():
    title = family().unique().plot().get_suptitle()
    assert "merged from 3 particles" in title and "ESS of these 2 weights" in title


def test_figures_pickle_and_show_themselves_in_notebooks():
    figure = family().plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure)).get_suptitle() == figure.get_suptitle()


def test_no_global_state_is_touched():
    code = """
import sys, matplotlib
# Reading the backend would choose one.
settings = lambda: {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
sys.path.insert(0, sys.argv[1])
from test_plotting import family
family().plot()._repr_png_()
family().plot_genealogy()
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], check=True)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (family().plot, family().plot_genealogy):
        with pytest.raises(ImportError, match=r"pip install 'ponder-ppl\[plot\]'"):
            draw()
