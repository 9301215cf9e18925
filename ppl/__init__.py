r"""ponder: LLM decoding as Bayesian inference.

A language model is a prior over traces, potentials are evidence, and kernels draw the posterior:

    lm = ponder.models.load("smollm2-135m-instruct")
    day = ponder.regex(r" [A-Z][a-z]+day\.")
    program = ponder.Generation(lm, "Today is", max_new_tokens=8, potential=day)
    posterior = ponder.inference.smc(program, num_particles=32).run(jax.random.key(0))
"""

import lazy_loader

__version__ = "0.1.0"

# Every name is loaded on first use: `import ponder` costs nothing, and the command line can answer, or be
# interrupted, before jax is there.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
