"""Names of rows that a user sees: a prefix that says what it is, and chance."""

import secrets

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str) -> str:
    """Return ``prefix_`` and 26 random characters (130 bits, Crockford's base 32)."""
    return f"{prefix}_" + "".join(secrets.choice(_ALPHABET) for _ in range(26))
