"""One run: its directory, its record, and what it was made with."""
