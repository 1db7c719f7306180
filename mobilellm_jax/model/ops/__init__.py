"""Matrix products, attention and cross-entropy, with custom gradients."""
