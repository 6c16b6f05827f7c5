"""Team mode: real PostgreSQL, Redis, API, beat and workers, as processes."""
