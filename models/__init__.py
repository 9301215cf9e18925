"""Language and reward models in JAX: what a program asks of them, a particle cache, and loaders.

Names load their module on first use (PEP 562): the protocols must not cost an import of flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ponder.models.config import DecoderConfig as DecoderConfig
    from ponder.models.decoder import Decoder as Decoder
    from ponder.models.language_model import DecoderLM as DecoderLM
    from ponder.models.loading import load as load
    from ponder.models.protocols import LanguageModel as LanguageModel
    from ponder.models.protocols import RewardModel as RewardModel
    from ponder.models.protocols import Tokenizer as Tokenizer
    from ponder.models.reward_loading import load_reward as load_reward
    from ponder.models.reward_model import RewardDecoder as RewardDecoder
    from ponder.models.table import PieceTokenizer as PieceTokenizer
    from ponder.models.table import TableLM as TableLM
    from ponder.models.table import TableReward as TableReward
    from ponder.models.weights import from_weights as from_weights

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DecoderLM",
    "LanguageModel",
    "PieceTokenizer",
    "RewardDecoder",
    "RewardModel",
    "TableLM",
    "TableReward",
    "Tokenizer",
    "from_weights",
    "load",
    "load_reward",
]

# No name may also be the name of a module here: importing the module would hide it.
_HOME = {
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "DecoderLM": "language_model",
    "LanguageModel": "protocols",
    "PieceTokenizer": "table",
    "RewardDecoder": "reward_model",
    "RewardModel": "protocols",
    "TableLM": "table",
    "TableReward": "table",
    "Tokenizer": "protocols",
    "from_weights": "weights",
    "load": "loading",
    "load_reward": "reward_loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
