"""Files under the hash of their bytes, and the one door through which foreign files come in."""
