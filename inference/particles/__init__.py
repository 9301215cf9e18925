"""Kernels over particles: sequential Monte Carlo in its forms, and resampling."""
