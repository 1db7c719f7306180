"""What makers promise of their devices."""

# bfloat16 FLOP/s, by part of jax's device name; the first match counts, and "TPU v5" alone is v5p.
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
