"""Generation, likelihoods and zero-shot tasks."""
