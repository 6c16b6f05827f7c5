"""One file a family: the constant FAMILY at its end is its table."""
