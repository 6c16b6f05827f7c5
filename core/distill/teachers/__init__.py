"""Teachers: one file each, found by its name. A teacher turns queries into targets."""
