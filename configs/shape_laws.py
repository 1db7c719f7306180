"""What shape should it be, and what is a repeat worth? Size, horizon, aspect ratio and sharing, in one law.

  python -m experiments.sweep --config=configs/shape_laws.py:laptop --workdir=runs/laws
 --config.data.source=files:novels_train.jsonl.xz --config.data.valid_source=files:novels_valid.jsonl.xz
  python -m experiments.scaling --workdir=runs/laws

A preset is a size and a horizon: `100k_8` has 100,000 parameters outside the embeddings and 8 training tokens
for each. Every cell has four aspect ratios (width over layers, about 96, 32, 12 and 4; where that takes less
than one block, one block), and at two of them every order of applying the blocks twice, with two controls:
the unshared stack of the same depth (twice the blocks), and the unshared stack trained for as many FLOPs (1.4
to 1.8 times the steps). `laptop` is the cells of 33k, and of 100k up to 8 tokens per parameter; `full` all,
with the aspect ratios at one million parameters, `1m_2` and `1m_8`, to check the law on.

The cells of `laptop` and `300k_2` tune the rate of each design. Searching rates for the others would take
days, so all their designs use one rate, which a line through those optima predicts from tokens and
parameters. That serves `completep` alone, where optima of one cell differ by little more than their fits can
tell. `python -m experiments.scaling` prints the line, and what its error costs.

Any long text serves; ours is the English part of ELTeC, 80 novels, see docs/data.md. `100k_32` takes 3.2
million tokens, `1m_8` 8 million and `300k_32` 9.6 million: the text should have as many, since a second
reading is worth less than a first. Embeddings are untied, as in the paper's tables 2, 11 and 14. Under
`completep` throughout, and under `standard` where rates are tuned at 100k as well; both have the
initialisation 1 / sqrt(width) at the base shape, 2 x 64.

What it cannot show: vocabularies (2,048 entries), contexts beyond 256 tokens, more than 1 million parameters.
"""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

# depth, num_heads, width, ffn_width: equal non-embedding parameters within 2 %, head size 16
_SHAPES = {
    "33k": ((1, 3, 52, 146), (2, 2, 38, 100), (3, 2, 30, 78), (6, 1, 22, 60)),
    "100k": ((1, 6, 90, 242), (2, 4, 64, 174), (4, 3, 46, 116), (8, 2, 32, 86)),
    "300k": ((1, 10, 158, 418), (3, 6, 90, 242), (6, 4, 64, 174), (12, 3, 46, 116)),
    "1m": ((2, 13, 206, 530), (4, 9, 144, 386), (8, 6, 104, 272), (18, 4, 68, 186)),
}
_PARAMETERS = {"33k": 33_000, "100k": 100_000, "300k": 300_000, "1m": 1_000_000}
_HORIZONS = (2, 8, 32)  # training tokens per parameter
_SHARED = (1, 2)  # places in `_SHAPES` of the designs that are also shared: D/L about 32 and 12
# Training FLOPs of those with every block applied twice, over those of once. At 1m, none are shared.
_FLOPS = {"33k": (1.3862, 1.4824), "100k": (1.5027, 1.6122), "300k": (1.6697, 1.752)}
_ORDERS = ("immediate", "repeat_all", "reverse")
_BATCH = 4
_LENGTH = 256
_CHECKS = ("1m_2", "1m_8")  # the largest size, which is left out once to test the law
CELLS = (*(f"{size}_{horizon}" for size in ("33k", "100k", "300k") for horizon in _HORIZONS), *_CHECKS)
_UNTUNED = ("100k_32", "300k_8", "300k_32", *_CHECKS)
# log2 of the best rate at 100k parameters and a million tokens, and its change for each doubling of either,
# from experiments/reports/shape_laws.md.
_RATE = (-6.17, -0.0699, -0.182)
COLLECTIONS = {"laptop": CELLS[:5], "full": CELLS}
PRESETS = base.presets_of(COLLECTIONS)


def get_config(preset: str = "laptop") -> ConfigDict:
    """Config that all points share; of a collection, the fields that can be set on the command line."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    if preset in COLLECTIONS:
        return config
    config.model.head_dim = 16
    config.model.share_embedding = False
    base.use_base_shape(config, 2, 64)  # in all cells, so that rates carry over from cell to cell
    config.data.sequence_length = _LENGTH
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.learning_rate = _rate(preset) if preset in _UNTUNED else 2**-7
    train = config.train
    train.batch_size = _BATCH
    train.steps = _steps(preset)
    config.optimizer.warmup_steps = min(round(0.1 * train.steps), 200)
    train.eval_every = train.steps
    train.checkpoint_every = max(train.steps // 2, 1)
    train.log_every = max(train.steps // 4, 1)
    train.eval_batch_size = 32
    return config


def studies(preset: str) -> list[str]:
    """Cells of a collection, the smallest first; a cell is a study itself."""
    return base.members(__file__, COLLECTIONS, preset)


def study(preset: str) -> base.Study:
    size, _ = preset.split("_")
    shapes = [_label(shape) for shape in _SHAPES[size]]
    pairs = [(label, shapes[1]) for label in shapes if label != shapes[1]]
    controls = []
    for place, _ in _shared(size):
        shape = _SHAPES[size][place]
        once, deep, long = shapes[place], _label(shape, 2), f"{shapes[place]}, equal FLOPs"
        pairs += [(f"{once} {order}", once) for order in _ORDERS]
        pairs += [(f"{once} immediate", deep), (f"{once} immediate", long)]
        controls += [deep, long]
    return base.Study(
        question="Which aspect ratio is best, and what is it worth to apply every block twice, and how?",
        scientific=("model.depth", "model.width", "model.sharing", "train.steps"),
        labels=[label for label, _ in _rows(preset)],
        pairs=pairs,
        arms=base.BOTH if size == "100k" and preset not in _UNTUNED else base.COMPLETEP,
        learning_rates=() if preset in _UNTUNED else (2**-8, 2**-7, 2**-6),
        transferred=preset in _UNTUNED,
        matched="non_embedding_parameters",
        tolerance=0.02,
        controls=controls,
        seeds=3,
        margin=0.02,
        sd=0.015,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    for _, row in _rows(preset):
        yield row


def _rows(preset: str) -> Iterator[tuple[str, base.Overrides]]:
    size, _ = preset.split("_")
    for shape in _SHAPES[size]:
        yield _label(shape), _row(shape, preset)
    for place, flops in _shared(size):
        shape = _SHAPES[size][place]
        once = _row(shape, preset)
        for order in _ORDERS:
            yield f"{_label(shape)} {order}", {**once, "model.sharing": order, "model.num_repeats": 2}
        yield _label(shape, 2), {**once, "model.depth": 2 * shape[0]}
        yield f"{_label(shape)}, equal FLOPs", {**once, "train.steps": round(_steps(preset) * flops)}


def _shared(size: str) -> list[tuple[int, float]]:
    """Places in `_SHAPES` of the designs of a size that are also shared, each with its `_FLOPS`."""
    return list(zip(_SHARED, _FLOPS[size], strict=True)) if size in _FLOPS else []


def _row(shape: tuple[int, int, int, int], preset: str) -> base.Overrides:
    names = ("model.depth", "model.num_heads", "model.width", "model.ffn_width")
    return {
        **dict(zip(names, shape, strict=True)),
        "model.sharing": "none",
        "model.num_repeats": 1,
        "train.steps": _steps(preset),
    }


def _label(shape: tuple[int, int, int, int], times: int = 1) -> str:
    return f"{times * shape[0]} x {shape[2]}"


def _rate(preset: str) -> float:
    """The best rate that the line predicts for a cell."""
    size, horizon = preset.split("_")
    parameters = _PARAMETERS[size]
    at, of_parameters, of_tokens = _RATE
    tokens = parameters * int(horizon)
    return 2 ** (at + of_parameters * math.log2(parameters / 1e5) + of_tokens * math.log2(tokens / 1e6))


def _steps(preset: str) -> int:
    size, horizon = preset.split("_")
    return round(_PARAMETERS[size] * int(horizon) / (_BATCH * _LENGTH))
