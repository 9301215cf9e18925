"""The small models that come inside the package, by name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CHECKPOINTS", "SHIPPED_MODELS", "shipped_directory"]

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
SHIPPED_MODELS = (
    "countdown-tiny",
    "countdown-tiny-prm",
    "countdown-tiny-rollout-prm",
    "countdown-five-tiny",
    "chain-tiny",
    "chain-tiny-prm",
)


def shipped_directory(name: str) -> Path | None:
    """Return the directory (hub format) of a shipped model, or None if no shipped model has this name."""
    return CHECKPOINTS / name.lower() if name.lower() in SHIPPED_MODELS else None
