"""The training step, its compiled programs, and the loop around them."""
