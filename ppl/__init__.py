r"""ponder: LLM decoding as Bayesian inference.

A language model is a prior over traces, potentials are evidence, and kernels draw the posterior:

    lm = ponder.models.load("smollm2-135m-instruct")
    day = ponder.regex(r" [A-Z][a-z]+day\.")
    program = ponder.Generation(lm, "Today is", max_new_tokens=8, potential=day)
    posterior = ponder.inference.smc(program, num_particles=32).run(jax.random.key(0))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ponder import calibration as calibration
    from ponder import inference as inference
    from ponder import models as models
    from ponder import testing as testing
    from ponder.context_free import grammar as grammar
    from ponder.experts import expert as expert
    from ponder.generation import Generation as Generation
    from ponder.host_reward import text_reward as text_reward
    from ponder.host_text import text as text
    from ponder.options import choice as choice
    from ponder.pattern import regex as regex
    from ponder.posterior import Posterior as Posterior
    from ponder.posterior import Stats as Stats
    from ponder.potentials import Composable as Composable
    from ponder.potentials import power as power
    from ponder.potentials import tokens as tokens
    from ponder.process_rewards import process_reward as process_reward
    from ponder.protocols import Context as Context
    from ponder.protocols import Move as Move
    from ponder.protocols import Potential as Potential
    from ponder.protocols import StateSpaceModel as StateSpaceModel
    from ponder.reliability_plot import plot_reliability as plot_reliability
    from ponder.schema import json_schema as json_schema
    from ponder.self_judging import self_evaluation as self_evaluation
    from ponder.step import Step as Step

__version__ = "0.1.0"

_SUBMODULES = ("calibration", "inference", "models", "testing")

# Where each name lives. All is loaded on first use: `import ponder` costs nothing, and the command line can
# answer, or be interrupted, before jax is there. The imports above tell type checkers the same.
_HOMES = {
    "grammar": "ponder.context_free",
    "expert": "ponder.experts",
    "Generation": "ponder.generation",
    "text_reward": "ponder.host_reward",
    "text": "ponder.host_text",
    "choice": "ponder.options",
    "regex": "ponder.pattern",
    "Posterior": "ponder.posterior",
    "Stats": "ponder.posterior",
    "Composable": "ponder.potentials",
    "power": "ponder.potentials",
    "tokens": "ponder.potentials",
    "process_reward": "ponder.process_rewards",
    "Context": "ponder.protocols",
    "Move": "ponder.protocols",
    "Potential": "ponder.protocols",
    "StateSpaceModel": "ponder.protocols",
    "plot_reliability": "ponder.reliability_plot",
    "json_schema": "ponder.schema",
    "self_evaluation": "ponder.self_judging",
    "Step": "ponder.step",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES or f"{__name__}.{name}" in _HOMES.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBMODULES})
