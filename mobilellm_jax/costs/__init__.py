"""Costs of a shape: parameters, FLOPs, bytes, collectives; and the search for shapes of equal cost."""
