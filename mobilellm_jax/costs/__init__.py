"""What a shape costs: parameters, FLOPs, bytes, collectives; and shapes of equal cost."""
