"""Weights and activations of few bits: schemes by name, and what they do to a trained model."""
