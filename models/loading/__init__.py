"""Models from files: directories in hub format, GGUF files, and the checkpoints that ship."""
