"""What is worked out from a posterior's arrays needs no `Posterior`, only something with its fields."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from ponder.posterior import Posterior, Stats, arrays
from ponder.posterior.answers import posterior_over_answers
from ponder.posterior.display import heaviest, summary
from ponder.posterior.genealogy import genealogy
from ponder.posterior.saving import save

PIECES = (b"a", b"b", b"")


@pytest.fixture
def posterior(make_posterior):
    told = {"ancestors": np.zeros((3, 4), np.int32), "num_tokens": np.ones((3, 4), np.int32)}
    rows, weights = [[0, 2], [1, 1], [0, 2], [1, 2]], [0.1, 0.25, 0.25, 0.4]
    return make_posterior(rows, weights, PIECES, num_steps=np.int32(2), resampled=np.arange(3) > 0, **told)


@pytest.fixture
def bare(posterior):
    """The fields alone."""
    return SimpleNamespace(**{f.name: getattr(posterior, f.name) for f in dataclasses.fields(posterior)})


def test_merging_puts_the_heaviest_first_and_ties_in_the_order_of_rows(bare, make_posterior):
    rows, weights = arrays.merge(bare)
    assert rows.tolist() == [3, 0, 1]
    np.testing.assert_allclose(weights, [0.4, 0.35, 0.25], atol=1e-7)
    rows, _ = arrays.merge(make_posterior([1, 0, 0, 2], [0.25] * 4, PIECES))
    assert rows.tolist() == [1, 0, 3]


def test_history_is_cut_to_the_steps_that_were_taken(bare):
    found = arrays.history(bare.stats)
    assert found.resampled.tolist() == [False, True]
    assert found.ancestors.shape == found.num_tokens.shape == (2, 4)
    assert found.ess is None and found.num_steps == 2
    assert arrays.history(Stats(num_steps=np.int32(3))) == Stats(num_steps=3)


def test_the_fields_are_enough(bare, posterior, tmp_path):
    assert summary(bare) == posterior.summary()
    assert heaviest(bare, 2) == heaviest(posterior, 2)
    assert genealogy(bare).num_roots == genealogy(posterior).num_roots == 1
    assert posterior_over_answers(bare, len).answers == posterior.answers(len).answers
    save(bare, tmp_path / "p")
    assert Posterior.load(tmp_path / "p").text == posterior.text
