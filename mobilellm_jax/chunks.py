"""How attention cuts a row into chunks of queries, each of which skips the keys after it."""

from collections.abc import Iterator

# Smaller chunks skip more, at smaller matrix products: 8 chunks compute 9/16 of all products. Measured on
# 2 cores at 1,024 positions against `jax.nn.dot_product_attention`: a third of the time forward, less than
# half of it forward and backward.
_MOST, _SMALLEST = 8, 64


def chunks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yields the slices of queries and of the keys that they may attend to."""
    size = max(_SMALLEST, -(-length // _MOST))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(0, stop)


def mean_keys(length: int) -> float:
    """Average number of keys that a query is multiplied with, over `length` positions."""
    return sum((queries.stop - queries.start) * keys.stop for queries, keys in chunks(length)) / length
