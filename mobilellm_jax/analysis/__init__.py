"""From records to verdicts: plain Python and NumPy, never jax."""
