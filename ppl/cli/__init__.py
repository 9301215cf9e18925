"""The command line, `ponder`."""
