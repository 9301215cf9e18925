"""How any algorithm is run: the loop, its compilation, its checkpoints."""
