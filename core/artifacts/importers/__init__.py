"""Reads foreign files into the data formats. Runs in the sandbox; nothing read is ever executed."""
