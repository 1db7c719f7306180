"""Shapes of equal cost: the width, heads and feed-forward width that meet a budget at a given depth."""

import dataclasses
import math
from collections.abc import Iterable, Iterator

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.latency import TIMES, Latency
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.sharing import STRATEGIES
from mobilellm_jax.validation import BELOW_ONE, POSITIVE, POSITIVE_INT, check, check_all, check_rule

# None falls with depth, heads or feed-forward width, so that the search terminates.
BUDGETS = (
    "total_parameters",
    "non_embedding_parameters",
    "train_flops_per_token",
    "decode_bytes_per_token",
    *TIMES,  # of a device: with a `Latency` only
)
_MOST_DEPTH, _MOST_WIDTH = 1024, 16_384
_NEAREST = 3  # shapes named in the error if none fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Search space and tolerances.

    Attributes:
      head_dims: allowed head sizes; () allows the base's only.
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
            check_rule("head_dim", head_dim, POSITIVE_INT)
        check_all(self, {"ffn_step": POSITIVE_INT, "ffn_band": BELOW_ONE, "tolerance": BELOW_ONE})


@dataclasses.dataclass(frozen=True)
class Shape:
    """A candidate shape.

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


@dataclasses.dataclass(frozen=True)
class _Search:
    """The arguments of `solve` that rank shapes."""

    base: ModelConfig
    budget: str
    target: float
    length: int
    rules: Rules
    latency: Latency | None

    @property
    def ratio(self) -> float:
        return self.base.ffn_width / self.base.width

    def shape(self, sizes: ModelConfig, ffn_width: int) -> Shape:
        config = dataclasses.replace(sizes, ffn_width=ffn_width)
        cost = accounting.budgets(config, self.length, rows=1, latency=self.latency)[self.budget]
        return Shape(config, cost / self.target - 1)

    def rank(self, shape: Shape) -> tuple[bool, float, float, float]:
        """Sort key, best first: within the tolerance, then distance in proportions, budget, head size."""
        distance = abs(shape.mismatch)
        proportion = abs(shape.config.ffn_width / shape.config.width / self.ratio - 1)
        heads = abs(math.log(shape.config.head_dim / self.base.head_dim))
        missed = distance > self.rules.tolerance
        return (True, distance, proportion, heads) if missed else (False, proportion, distance, heads)

    def candidates(self, ascending: Iterable[ModelConfig]) -> Iterator[Shape]:
        """Yields shapes in ascending size: all that may be the best, or the nearest of a size if all miss."""
        too_large = 0
        for sizes in ascending:
            ffn_widths = _ffn_widths(sizes.width, self.ratio, self.rules)
            if not ffn_widths:
                continue
            least, most = (self.shape(sizes, ffn_widths[i]) for i in (0, -1))
            if most.mismatch < -self.rules.tolerance:
                yield most
            elif least.mismatch <= self.rules.tolerance:
                yield from (self.shape(sizes, ffn_width) for ffn_width in ffn_widths)
            else:
                yield least
                too_large += 1
                if too_large == _NEAREST:
                    return  # all that follow are larger still


def solve(
    base: ModelConfig,
    budget: str,
    target: float,
    *,
    length: int,
    rules: Rules,
    depth: int | None = None,
    width: int | None = None,
    latency: Latency | None = None,
) -> Shape:
    """Finds the shape that meets a budget best, at a given depth or else at a given width.

    All but depth, width, heads and feed-forward width is as in `base`, and so is the number of query heads
    per key/value head; width = num_heads * head_dim. The search covers all shapes under `rules` that are at
    most 16,384 wide and 1,024 blocks deep. Of those within the tolerance, it picks the one whose
    ffn_width / width is closest to the base's; ties go to the closest to the target, then to the head size
    closest to the base's. Proportions come first, since a study that changes them answers another question.

    Args:
      base: the model to vary.
      budget: one of `BUDGETS`.
      target: its target value.
      length: tokens of a row, which FLOPs depend on.
      rules: see `Rules`.
      depth, width: exactly one of them.
      latency: of the device whose `decode_ms` or `prefill_ms` is the budget.

    Raises:
      UserError: an argument is not valid, or no shape is within the tolerance; the message has the nearest
        ones, each of a different width (or depth).
    """
    check(budget in BUDGETS, "budget", budget, f"a budget; {did_you_mean(budget, BUDGETS)}")
    check_rule(budget, target, POSITIVE)
    if budget in TIMES and latency is None:
        raise UserError(f"budget: {budget} is that of a device; give a table of its latency")
    check((depth is None) != (width is None), "depth, width", (depth, width), "one of them and not the other")
    for name, value, most in (("depth", depth, _MOST_DEPTH), ("width", width, _MOST_WIDTH)):
        check(value is None or 1 <= value <= most, name, value, f"an integer from 1 to {most:,}")
    if width is not None and base.sharing not in STRATEGIES:
        raise UserError(
            f"width: {width}: the plan model.sharing={base.sharing!r} fixes the depth; give depth"
        )
    search = _Search(base, budget, target, length, rules, latency)
    families = _ascending(base, rules.head_dims or (base.head_dim,), depth, width)
    found = [shape for ascending in families for shape in search.candidates(ascending)]
    if not found:
        raise UserError(
            f"ffn_step: no multiple of {rules.ffn_step} is within {rules.ffn_band:.0%} of "
            f"{search.ratio:.3g} widths; lower ffn_step or raise ffn_band"
        )
    best = min(found, key=search.rank)
    if abs(best.mismatch) > rules.tolerance:
        at = f"depth {depth}" if width is None else f"width {width}"
        ranked = sorted(found, key=search.rank)
        distinct = {(shape.config.depth, shape.config.width): shape for shape in reversed(ranked)}
        nearest = "; ".join(map(_describe, sorted(distinct.values(), key=search.rank)[:_NEAREST]))
        raise UserError(
            f"{budget}: no shape of {at} is within {rules.tolerance:.2%} of {shown(target)}; "
            f"nearest: {nearest}. Allow other head sizes, a wider ffn_band or a larger tolerance"
        )
    return best


def _ascending(
    base: ModelConfig, head_dims: tuple[int, ...], depth: int | None, width: int | None
) -> Iterator[Iterator[ModelConfig]]:
    """Yields, for every head size, the configs of all sizes but the feed-forward width, smallest first."""
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
    """Multiples of `ffn_step` whose ratio to `width` is within `ffn_band` of `ratio`."""
    rounding = 1e-9  # a band of 0 allows the base's own ratio
    first = math.ceil(width * ratio * (1 - rules.ffn_band) / rules.ffn_step - rounding)
    last = math.floor(width * ratio * (1 + rules.ffn_band) / rules.ffn_step + rounding)
    return range(max(1, first) * rules.ffn_step, last * rules.ffn_step + 1, rules.ffn_step)


def shown(cost: int | float) -> str:
    """A cost in digits: milliseconds are small, all other budgets are counts."""
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.4g}"


def _describe(shape: Shape) -> str:
    c = shape.config
    return (
        f"depth {c.depth}, width {c.width}, {c.num_heads} heads of {c.head_dim}, {c.num_kv_heads} kv heads, "
        f"ffn_width {c.ffn_width} ({shape.mismatch:+.2%})"
    )
