"""Python functions called from inside compiled code, and what becomes of the errors that they raise."""
