"""HTTP in; JSON, event streams and HTML out. No rule of the domain lives here."""
