"""One run: its directory, its record and its provenance."""
