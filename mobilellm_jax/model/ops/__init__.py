"""Matrix products, attention and cross-entropy, with gradients written by hand."""
