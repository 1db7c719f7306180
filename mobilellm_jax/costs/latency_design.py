"""The shapes that a latency model is fitted to: spread evenly over what a study may ask about.

A low-discrepancy sequence in place of random numbers or a grid: any first part of it covers the whole space.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.costs.latency import features

_HEAD_DIMS, _GROUPS = (8, 16, 32, 64), (1, 1, 2, 3)
_SHARING = ("none", "none", "immediate", "repeat_all", "reverse")
_MOST_LAYERS = 32  # a layer takes 0.2 s to compile

T = TypeVar("T")


def designed(
    base: ModelConfig,
    count: int,
    most_megabytes: int | float,
    most_slots: int,
    kind: str | None = None,
    multiple: int = 1,
) -> list[tuple[ModelConfig, int]]:
    """The first `count` shapes, and the slots of the cache for each.

    Depth (1 to 24), width (32 to 768), vocabulary (256 to 32,768) and slots (32 to `most_slots`, powers of 2)
    are spread on a logarithmic scale; with them, the head size, the query heads for each key/value head, the
    feed-forward width (1 to 4 widths) and the sharing of blocks, once or applied twice.

    Args:
      base: everything else.
      count: at least 1.
      most_megabytes: a shape whose layers and head read more than this for a token is left out.
      most_slots: of a cache.
      kind: type of the weights, as in `features`.
      multiple: of widths; 32 where weights have a scale for each group of 32.
    """
    found: list[tuple[ModelConfig, int]] = []
    for point in _sequence(dimensions=8):
        config, slots = _shape(base, point, most_slots, multiple)
        work = features("decode_ms", config, slots, kind)
        read = sum(amount for name, amount in work.items() if name.startswith("MB"))
        if config.effective_depth <= _MOST_LAYERS and read <= most_megabytes:
            found.append((config, slots))
        if len(found) == count:
            return found
    raise AssertionError("the sequence has no end")


def _sequence(dimensions: int) -> Iterator[list[float]]:
    """Yields points of the unit cube: multiples of powers of the root of x^(d + 1) = x + 1 (Roberts 2018)."""
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    number = 0
    while True:
        number += 1
        yield [float(of) for of in (0.5 + number * steps) % 1]


def _shape(
    base: ModelConfig, point: Sequence[float], most_slots: int, multiple: int
) -> tuple[ModelConfig, int]:
    depth, width, head_dim, group, ffn, vocabulary, sharing, slots = point
    H, G, plan = _choice(head_dim, _HEAD_DIMS), _choice(group, _GROUPS), _choice(sharing, _SHARING)
    unit, ffn_unit = math.lcm(G * H, multiple), math.lcm(8, multiple)
    D = unit * max(1, round(_between(width, 32, 768) / unit))
    heads = D // H
    config = dataclasses.replace(
        base,
        depth=round(_between(depth, 1, 24)),
        width=D,
        num_heads=heads,
        num_kv_heads=heads // G,
        head_dim=H,
        ffn_width=ffn_unit * max(1, round(D * _between(ffn, 1, 4) / ffn_unit)),
        vocab_size=round(_between(vocabulary, 256, 32_768)),
        sharing=plan,
        num_repeats=1 if plan == "none" else 2,
    )
    powers = range(5, most_slots.bit_length())
    return config, 2 ** powers[int(slots * len(powers))]


def _between(share: float, low: int, high: int) -> float:
    """The place of a share of the way from `low` to `high`, on a logarithmic scale."""
    return low * (high / low) ** share


def _choice(share: float, options: Sequence[T]) -> T:
    return options[int(share * len(options))]
