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

from ponder.generation import Generation as Generation
from ponder.host_text import text as text
from ponder.pattern import regex as regex
from ponder.posterior import Posterior as Posterior
from ponder.posterior import Stats as Stats
from ponder.potentials import Composable as Composable
from ponder.potentials import power as power
from ponder.potentials import tokens as tokens
from ponder.protocols import Move as Move
from ponder.protocols import Potential as Potential
from ponder.protocols import StateSpaceModel as StateSpaceModel

if TYPE_CHECKING:
    from ponder import inference as inference
    from ponder import models as models
    from ponder import testing as testing

__version__ = "0.1.0"

# Loaded on first use, so that `import ponder` stays light.
_SUBMODULES = ("inference", "models", "testing")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
