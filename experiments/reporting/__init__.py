"""Tables, figures and pages from records alone, without jax."""
