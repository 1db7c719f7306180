"""Depth probes: a task that takes as many lookups as it has hops, at equal size and for every way to be deep.

  python -m experiments.sweep --config=configs/khop.py:tiny

An answer is exactly right or not, so that small models can be told apart in minutes. `tiny` compares one
wide block, two, four thin ones, one applied four times, and two applied twice in each of three orders, on
two lookups; a run takes 6 to 18 seconds of one CPU core. With 1,000 steps at 2**-7, one wide block is wrong
in 40 % (3 seeds: 17 % to 63 %), all others in less than 2 %; at 2**-6 some of the others are wrong in 4 %
to 39 %, so that an untuned comparison would have found something else.

`orders` asks for three lookups, of the three orders alone; a run takes about a minute. `control` asks the
shapes of `tiny` for a single lookup, which needs no depth. `laptop` is `tiny` with a lookup more, twice the
parameters and 4,000 steps; it should take an hour on 2 cores, and has not been run.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

# depth, num_heads, width, ffn_width: equal parameters within 1 %
_SHAPES_25K = ((1, 2, 48, 108), (2, 2, 32, 86), (4, 2, 24, 54))
_SHAPES_50K = ((1, 2, 64, 172), (2, 2, 48, 108), (4, 2, 32, 86))
_HOPS = {"tiny": 2, "orders": 3, "laptop": 3}
_STEPS = {"tiny": 1000, "orders": 3000, "control": 500, "laptop": 4000}
PRESETS = tuple(_STEPS)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    depth, _, width, _ = _shapes(preset)[1]
    base.use_base_shape(config, depth, width)
    config.model.rope_base = 1e8  # rows are short: with 1e4, position blurs the match by content
    data, train = config.data, config.train
    if preset == "control":
        config.model.vocab_size = 63
        data.source = "recall:pairs=7,symbols=7,queries=4"
        data.valid_source = "recall:pairs=7,symbols=7,queries=1"
        data.sequence_length = 14
    else:
        hops = _HOPS[preset]
        config.model.vocab_size = 57
        data.source = f"khop:hops={hops},min_hops=1,symbols=7,queries=4"
        data.valid_source = f"khop:hops={hops},min_hops={hops},symbols=7,queries=1"  # one answer, and no help
        data.sequence_length = 6 + sum(k + 8 for k in range(1, hops + 1))
    config.optimizer.learning_rate = 2**-7
    config.optimizer.warmup_steps = 50
    train.steps = _STEPS[preset]
    train.batch_size = 32
    train.eval_every = train.steps // 5
    train.eval_rows = 1024  # standard error of an error of 50 %: 1.6 points
    train.eval_batch_size = 512
    train.checkpoint_every = train.steps
    train.log_every = train.steps // 5
    return config


def study(preset: str) -> base.Study:
    (_, _, wide, _), (_, _, middle, _), (_, _, thin, _) = _shapes(preset)
    one, two, four = (f"{u} x {width} x none" for u, width in ((1, wide), (2, middle), (4, thin)))
    loop = f"1 x {wide} x immediate"
    immediate, repeat_all, reverse = (f"2 x {middle} x {s}" for s in ("immediate", "repeat_all", "reverse"))
    orders = ((repeat_all, immediate), (immediate, reverse), (repeat_all, reverse))
    depths = ((two, one), (four, one), (loop, one), (four, two), (repeat_all, two), (loop, four))
    return base.Study(
        question="Which shapes of equal size learn to look up as often as the question asks?",
        scientific=("model.depth", "model.width", "model.sharing"),
        arms=base.BOTH,
        learning_rates=(2**-8, 2**-7, 2**-6),
        pairs=orders if preset == "orders" else depths + orders,
        metric="error",
        margin=0.02,
        seeds=5,
        matched="non_embedding_parameters",
        tolerance=0.01,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    wide, middle, thin = _shapes(preset)
    points = [(wide, "none", 1), (middle, "none", 1), (thin, "none", 1), (wide, "immediate", 4)]
    orders = [(middle, sharing, 2) for sharing in ("immediate", "repeat_all", "reverse")]
    for shape, sharing, repeats in orders if preset == "orders" else points + orders:
        fields = dict(zip(("depth", "num_heads", "width", "ffn_width"), shape, strict=True))
        yield {f"model.{name}": value for name, value in fields.items()} | {
            "model.sharing": sharing,
            "model.num_repeats": repeats,
        }


def _shapes(preset: str) -> tuple[tuple[int, int, int, int], ...]:
    return _SHAPES_50K if preset == "laptop" else _SHAPES_25K
