"""Potentials: evidence on the text of a trace, and how potentials are combined."""
