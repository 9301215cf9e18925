"""The present texts of a run, for one prompt and for several."""

import itertools

import jax
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.bases import BaseProgram
from ponder.inference.running.progress import Progress, present_texts


def test_texts_of_several_prompts_as_they_grow(toy, scores):
    program = ponder.Generation(toy, [[1, 2], [2, 0]], max_new_tokens=3, potential=scores)
    seen, texts = [], []

    def watch(report):
        seen.append(report)
        texts.append(report.texts)

    found = inference.importance_sampling(program, 3).run(jax.random.key(0), progress=watch, progress_every=1)
    assert [len(of_prompt) for of_prompt in texts[0]] == [3, 3]
    assert texts[-1] == [posterior.text for posterior in found]
    for before, after in itertools.pairwise(map(np.ravel, texts)):
        for one, other in zip(before, after, strict=True):
            assert other.startswith(one)
    assert "read_texts" not in repr(seen[0]) and "step=1" in repr(seen[0])
    with pytest.raises(ValueError, match="texts: expected to be read during the callback"):
        _ = seen[0].texts


def test_texts_that_nobody_tells():
    told = present_texts(BaseProgram(), lambda: pytest.fail("it is not asked"))
    with pytest.raises(ValueError, match="texts: not told by this program"):
        _ = Progress(1, 2, 0, 4, 1.0, -1.0, told).texts


def test_other_errors_come_through():
    def broken():
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        _ = Progress(1, 2, 0, 4, 1.0, np.nan, broken).texts
