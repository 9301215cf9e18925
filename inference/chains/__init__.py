"""Kernels that are Markov chains of whole traces."""
