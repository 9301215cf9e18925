"""Heuristic searches, as baselines: they state no target."""
