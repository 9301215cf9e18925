"""Language and reward models in JAX: what a program asks of them, a particle cache, and loaders.

Names load their module on first use: the protocols must not cost an import of flax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
