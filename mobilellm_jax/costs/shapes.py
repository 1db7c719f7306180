"""Shapes of equal cost: the width, heads and feed-forward width that meet a budget at a given depth."""

import dataclasses
import math
from collections.abc import Iterator

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.sharing import STRATEGIES

# Each grows with depth, heads and feed-forward width, which ends the search.
BUDGETS = (
    "total_parameters",
    "non_embedding_parameters",
    "train_flops_per_token",
    "decode_bytes_per_token",
)
_MOST_DEPTH, _MOST_WIDTH = 1024, 16_384
_NEAREST = 3  # shapes named where none fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Which shapes are looked at, and which are close enough.

    Attributes:
      head_dims: sizes a head may have; () allows the base's only.
      ffn_step: the feed-forward width is a multiple of it.
      ffn_band: largest relative distance of ffn_width / width from the base's.
      tolerance: largest relative distance from the budget's target.
    """

    head_dims: tuple[int, ...]
    ffn_step: int
    ffn_band: float
    tolerance: float

    def __post_init__(self) -> None:
        for head_dim in self.head_dims:
            _check(head_dim >= 1, "head_dim", head_dim, "an integer of at least 1")
        _check(self.ffn_step >= 1, "ffn_step", self.ffn_step, "an integer of at least 1")
        _check(0 <= self.ffn_band < 1, "ffn_band", self.ffn_band, "a number from 0 up to, but less than, 1")
        _check(
            0 <= self.tolerance < 1, "tolerance", self.tolerance, "a number from 0 up to, but less than, 1"
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape that was found.

    Attributes:
      config: the base with `fields` set.
      mismatch: its budget divided by the target, minus 1.
    """

    config: ModelConfig
    mismatch: float

    @property
    def fields(self) -> dict[str, int]:
        """The fields of `ModelConfig` that the search sets."""
        names = ("depth", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width")
        return {name: getattr(self.config, name) for name in names}


def solve(
    base: ModelConfig,
    budget: str,
    target: float,
    *,
    length: int,
    rules: Rules,
    depth: int | None = None,
    width: int | None = None,
) -> Shape:
    """Returns the shape that meets a budget best, at a given depth or else at a given width.

    Everything but depth, width, heads and feed-forward width is as in `base`, and so is the number of query
    heads for each key/value head; width = num_heads * head_dim. All shapes under `rules` that are at most
    16,384 wide and 1,024 blocks deep compete. Of those within the tolerance, the one whose ffn_width / width
    is closest to the base's wins, of equals the one closest to the target, and then the one with heads
    closest to the base's size. Proportions go first, since a study that changes them answers another
    question.

    Args:
      base: the model to vary.
      budget: one of `BUDGETS`.
      target: its wanted value.
      length: tokens of a row, which FLOPs depend on.
      rules: see `Rules`.
      depth, width: one of them.

    Raises:
      UserError: an argument is not valid, or no shape is within the tolerance: the message has the nearest
        ones, each of another width (or depth).
    """
    _check(budget in BUDGETS, "budget", budget, f"a budget; {did_you_mean(budget, BUDGETS)}")
    _check(0 < target < math.inf, budget, target, "a positive number")
    _check(
        (depth is None) != (width is None), "depth, width", (depth, width), "one of them and not the other"
    )
    for name, value, most in (("depth", depth, _MOST_DEPTH), ("width", width, _MOST_WIDTH)):
        _check(value is None or 1 <= value <= most, name, value, f"an integer from 1 to {most:,}")
    if width is not None and base.sharing not in STRATEGIES:
        raise UserError(f"width: {width}: the plan model.sharing={base.sharing!r} sets the depth; give depth")
    ratio = base.ffn_width / base.width

    def mismatch(config: ModelConfig) -> float:
        return accounting.budgets(config, length, rows=1)[budget] / target - 1

    def rank(shape: Shape) -> tuple[bool, float, float, float]:
        distance = abs(shape.mismatch)
        proportion = abs(shape.config.ffn_width / shape.config.width / ratio - 1)
        heads = abs(math.log(shape.config.head_dim / base.head_dim))
        missed = distance > rules.tolerance
        return (True, distance, proportion, heads) if missed else (False, proportion, distance, heads)

    found = []  # the best of each depth, width and head size
    for sizes in _ascending(base, rules.head_dims or (base.head_dim,), depth, width):
        too_large = 0
        for skeleton in sizes:
            ffn_widths = _ffn_widths(skeleton.width, ratio, rules)
            if not ffn_widths:
                continue
            least, most = (dataclasses.replace(skeleton, ffn_width=ffn_widths[i]) for i in (0, -1))
            low, high = mismatch(least), mismatch(most)
            if high < -rules.tolerance:
                found.append(Shape(most, high))
            elif low > rules.tolerance:
                found.append(Shape(least, low))
                too_large += 1
                if too_large == _NEAREST:
                    break  # all that follow are larger still
            else:
                configs = [dataclasses.replace(skeleton, ffn_width=F) for F in ffn_widths]
                found.append(min((Shape(config, mismatch(config)) for config in configs), key=rank))
    if not found:
        raise UserError(
            f"ffn_step: no multiple of {rules.ffn_step} is within {rules.ffn_band:.0%} of {ratio:.3g} widths"
        )
    found.sort(key=rank)
    if abs(found[0].mismatch) > rules.tolerance:
        at = f"depth {depth}" if width is None else f"width {width}"
        distinct = {(shape.config.depth, shape.config.width): shape for shape in reversed(found)}
        nearest = "; ".join(map(_describe, sorted(distinct.values(), key=rank)[:_NEAREST]))
        raise UserError(
            f"{budget}: no shape of {at} is within {rules.tolerance:.2%} of {target:,.0f}; "
            f"nearest: {nearest}. Allow other head sizes, a wider ffn_band or a larger tolerance"
        )
    return found[0]


def _ascending(
    base: ModelConfig, head_dims: tuple[int, ...], depth: int | None, width: int | None
) -> Iterator[Iterator[ModelConfig]]:
    """Yields, for every head size, all sizes but the feed-forward width, the smallest first."""
    group = base.num_heads // base.num_kv_heads

    def sized(depth: int, num_heads: int, head_dim: int) -> ModelConfig:
        heads = {"num_heads": num_heads, "num_kv_heads": num_heads // group, "head_dim": head_dim}
        return dataclasses.replace(base, depth=depth, width=num_heads * head_dim, **heads)

    if depth is not None:
        for head_dim in head_dims:
            yield (sized(depth, N, head_dim) for N in range(group, _MOST_WIDTH // head_dim + 1, group))
        return
    assert width is not None
    fitting = [head_dim for head_dim in head_dims if width % (group * head_dim) == 0]
    if not fitting:
        unit = group * head_dims[0]
        multiples = " or ".join(str(group * head_dim) for head_dim in head_dims)
        raise UserError(
            f"width: {width} is not a multiple of {multiples} (head_dim times the query heads for each "
            f"key/value head); the nearest: {unit * max(1, round(width / unit))}"
        )
    for head_dim in fitting:
        yield (sized(U, width // head_dim, head_dim) for U in range(1, _MOST_DEPTH + 1))


def _ffn_widths(width: int, ratio: float, rules: Rules) -> range:
    """Returns the multiples of the step whose ratio to `width` is in the band."""
    rounding = 1e-9  # a band of 0 allows the base's own ratio
    first = math.ceil(width * ratio * (1 - rules.ffn_band) / rules.ffn_step - rounding)
    last = math.floor(width * ratio * (1 + rules.ffn_band) / rules.ffn_step + rounding)
    return range(max(1, first) * rules.ffn_step, last * rules.ffn_step + 1, rules.ffn_step)


def _describe(shape: Shape) -> str:
    c = shape.config
    return (
        f"depth {c.depth}, width {c.width}, {c.num_heads} heads of {c.head_dim}, {c.num_kv_heads} kv heads, "
        f"ffn_width {c.ffn_width} ({shape.mismatch:+.2%})"
    )


def _check(ok: bool, field: str, value: object, valid: str) -> None:
    if not ok:
        raise UserError(f"{field}: {value!r} is not valid; expected {valid}")
