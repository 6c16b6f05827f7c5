"""What runs chunks: one process per device."""
