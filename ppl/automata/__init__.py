"""Finite automata: over the bytes of a text, and lifted to the tokens of a model."""
