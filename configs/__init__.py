"""What to run: one file per study or model."""
