"""Students: one file each, found by its name. A student is small, fast and keeps lengths."""
