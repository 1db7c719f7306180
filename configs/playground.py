"""The playground: which shape learns what, on generated data whose right answers are known.

  python -m experiments.sweep --config=configs/playground.py:tiny

Three abilities, one study each: structure (strings of a grammar: how far is the model from it?), manipulation
(nested arithmetic: how many answers are right?), knowledge (facts drawn at random: how many bits are
stored?); docs/playground has a page for each. Designs of equal size: one wide block, two, and a deeper,
thinner stack; then the two blocks applied twice, in two orders. Two controls lie outside that on purpose:
twice as many blocks, and the two blocks trained for as many FLOPs as applying them twice takes.

33,000 non-embedding parameters and 256,000 to 269,000 tokens (8,200 and 512,000 for knowledge): sizes at
which no design of equal size reaches the ceiling or stays on the floor. A run takes 3 to 6 seconds of a core.
Under CompleteP; `--arms=completep,standard` adds the paper's parameterization.

What it cannot show: how these abilities add up to text (configs/shape_laws.py is about that), and sizes at
which models are used. Learning jumps in the structure task, so that the spread over seeds is large there:
four seeds decide about factors of 2.4 and more in the distance from the grammar.
"""

import dataclasses
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

Shape = tuple[int, int, int, int]  # depth, num_heads, width, ffn_width; heads have size 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ability:
    """One ability at one size.

    Attributes:
      source: the task; {exposures} stands for how often each fact is told.
      vocab_size, length: token ids in use, and tokens a row predicts.
      shapes: designs of equal size, the widest first.
      shared: places in `shapes` of those that are also applied twice.
      flops: training FLOPs of those applied twice, over those of once.
      orders: in which they are.
      steps, batch_size, eval_rows: rows of training are steps x batch_size.
      exposures: of each fact, 0 where there are none.
      learning_rates: grid of the search.
      metric, margin: see `Study`.
    """

    source: str
    vocab_size: int
    length: int
    shapes: tuple[Shape, ...]
    shared: tuple[int, ...] = (1,)
    flops: tuple[float, ...]
    orders: tuple[str, ...] = ("immediate", "repeat_all")
    steps: int
    batch_size: int
    eval_rows: int
    exposures: int = 0
    learning_rates: tuple[float, ...]
    metric: str
    margin: float
    sd: float


_TINY_33K: tuple[Shape, ...] = ((1, 3, 52, 146), (2, 2, 38, 100), (4, 2, 26, 62))
_TINY_8K: tuple[Shape, ...] = ((1, 1, 28, 76), (2, 1, 20, 46), (3, 1, 18, 29))
_ABILITIES = {
    "structure_tiny": _Ability(
        source="structure:levels=3,symbols=3,rules=2,grammar=1,tokens=64",
        vocab_size=4,
        length=64,
        shapes=_TINY_33K,
        flops=(2.0,),
        steps=250,
        batch_size=16,
        eval_rows=256,
        learning_rates=(2**-7.5, 2**-6.5, 2**-5.5),
        metric="log_divergence",
        margin=0.25,  # a quarter nearer or farther
        sd=0.35,
    ),
    "manipulation_tiny": _Ability(
        source="manipulation:modulus=3,operations=3,operators=3",
        vocab_size=6,
        length=7,
        shapes=_TINY_33K,
        flops=(2.0,),
        steps=600,
        batch_size=64,
        eval_rows=1024,
        learning_rates=(2**-8.5, 2**-7.5, 2**-6.5),
        metric="wrong",
        margin=0.05,
        sd=0.03,
    ),
    "knowledge_tiny": _Ability(
        source="knowledge:people=640,attributes=4,values=32,wordings=2,symbols=10,exposures={exposures}",
        vocab_size=50,
        length=10,
        shapes=_TINY_8K,
        flops=(1.9,),
        steps=800,
        batch_size=64,
        eval_rows=640,
        exposures=80,
        learning_rates=(2**-7, 2**-6, 2**-5),
        metric="forgotten",
        margin=0.05,
        sd=0.04,
    ),
}
COLLECTIONS = {"tiny": ("structure_tiny", "manipulation_tiny", "knowledge_tiny")}
PRESETS = (*COLLECTIONS, *_ABILITIES)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share; of a collection, the fields that can be set on the command line."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    if preset in COLLECTIONS:
        return config
    ability = _ABILITIES[preset]
    depth, _, width, _ = ability.shapes[ability.shared[0]]
    base.use_base_shape(config, depth, width)
    config.model.vocab_size = ability.vocab_size
    config.model.head_dim = 16
    config.model.remat = "dots"
    config.data.source = _source(ability, 1.0)
    config.data.sequence_length = ability.length
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.learning_rate = ability.learning_rates[1]
    config.optimizer.warmup_steps = round(0.1 * ability.steps)
    train = config.train
    train.steps = ability.steps
    train.batch_size = ability.batch_size
    train.eval_every = max(ability.steps // 2, 1)
    train.log_every = train.checkpoint_every = ability.steps
    train.eval_rows = train.eval_batch_size = ability.eval_rows
    return config


def studies(preset: str) -> list[str]:
    """Abilities of a collection; an ability is a study itself."""
    return [f"configs/playground.py:{ability}" for ability in COLLECTIONS.get(preset, ())]


def arms(preset: str) -> tuple[str, ...]:
    """Parameterizations that a collection runs; --arms=completep,standard runs both."""
    return tuple(base.COMPLETEP) if preset in COLLECTIONS else ()


def study(preset: str) -> base.Study:
    ability = _ABILITIES[preset]
    shapes = [_label(shape) for shape in ability.shapes]
    pairs, controls = [], []
    for place in ability.shared:
        once, twice = shapes[place], _label(ability.shapes[place], 2)
        long = f"{once}, equal FLOPs"
        pairs += [(label, once) for label in shapes if label != once and place == ability.shared[0]]
        for order in ability.orders:
            pairs += [(f"{once} {order}", other) for other in (once, twice, long)]
        controls += [twice, long]
    return base.Study(
        question=f"What does a shape, or a second use of its blocks, do for {preset.partition('_')[0]}?",
        # A longer training tells each fact more often, which is a number of the source.
        scientific=("model.depth", "model.width", "model.sharing", "train.steps", "data.source"),
        labels=[label for label, _ in _rows(preset)],
        baseline=shapes[ability.shared[0]],
        pairs=pairs,
        arms=base.BOTH,
        learning_rates=ability.learning_rates,
        matched="non_embedding_parameters",
        tolerance=0.02,
        controls=controls,
        seeds=4,
        metric=ability.metric,
        margin=ability.margin,
        sd=ability.sd,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    for _, row in _rows(preset):
        yield row


def _rows(preset: str) -> Iterator[tuple[str, base.Overrides]]:
    ability = _ABILITIES[preset]
    for shape in ability.shapes:
        yield _label(shape), _row(ability, shape)
    for place, flops in zip(ability.shared, ability.flops, strict=True):
        shape = ability.shapes[place]
        once = _row(ability, shape)
        for order in ability.orders:
            yield f"{_label(shape)} {order}", {**once, "model.sharing": order, "model.num_repeats": 2}
        yield _label(shape, 2), {**once, "model.depth": 2 * shape[0]}
        yield f"{_label(shape)}, equal FLOPs", _row(ability, shape, flops)


def _row(ability: _Ability, shape: Shape, flops: float = 1.0) -> base.Overrides:
    names = ("model.depth", "model.num_heads", "model.width", "model.ffn_width")
    return {
        **dict(zip(names, shape, strict=True)),
        "model.sharing": "none",
        "model.num_repeats": 1,
        "data.source": _source(ability, flops),
        "train.steps": round(ability.steps * flops),
    }


def _source(ability: _Ability, flops: float) -> str:
    """The task; facts are told more often in a longer training."""
    return ability.source.format(exposures=round(ability.exposures * flops))


def _label(shape: Shape, times: int = 1) -> str:
    return f"{times * shape[0]} x {shape[2]}"
