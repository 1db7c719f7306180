"""Diagnostics of a trained model: what its layers do, and whether it uses its depth."""
