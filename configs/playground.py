"""The playground: which shape learns what, on generated data whose right answers are known.

  python -m experiments.sweep --config=configs/playground.py:tiny

Three abilities, one study each: structure (strings of a grammar: how far is the model from it?), manipulation
(nested arithmetic: how many answers are right?), knowledge (facts drawn at random: how many bits are
stored?); docs/playground has a page for each. Designs of equal size: one wide block, two, and a deeper,
thinner stack; then the two blocks applied twice, in two orders. Two controls lie outside that on purpose:
twice as many blocks, and the two blocks trained for as many FLOPs as applying them twice takes.

33,000 non-embedding parameters and 256,000 to 269,000 tokens (8,200 and 512,000 for knowledge): sizes at
which no design of equal size reaches the ceiling or stays on the floor. A run takes 3 to 6 seconds of a core.
Under CompleteP; `--arms=completep,standard` adds the paper's parameterization, as a check: a finding that
holds under one alone may be about that one.

  python -m experiments.sweep --config=configs/playground.py:tiny5     # and hops, breadth, the order reverse
  python -m experiments.sweep --config=configs/playground.py:laptop    # and sharing at a second depth
  python -m experiments.sweep --config=configs/playground.py:paper     # 8 x 512 and 12 x 768, on a GPU

`--list` says what each costs.

What it cannot show: how these abilities add up to text (configs/shape_laws.py is about that), and sizes at
which models are used. Learning jumps in the structure task, so that the spread over seeds is large there:
six seeds decide about factors of 2 and more in the distance from the grammar.
"""

import dataclasses
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

Shape = tuple[int, int, int, int]  # depth, num_heads, width, ffn_width


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
      head_dim, compute_dtype: as in the config, for all designs.
      steps, batch_size, eval_rows: rows of training are steps x batch_size.
      exposures: of each fact, 0 where there are none.
      learning_rates: grid of the search.
      metric, margin, sd, seeds: see `Study`.
    """

    source: str
    vocab_size: int
    length: int
    shapes: tuple[Shape, ...]
    shared: tuple[int, ...] = (1,)
    flops: tuple[float, ...]
    orders: tuple[str, ...] = ("immediate", "repeat_all")
    head_dim: int = 16
    compute_dtype: str = "float32"
    steps: int
    batch_size: int
    eval_rows: int
    exposures: int = 0
    learning_rates: tuple[float, ...]
    metric: str
    margin: float
    sd: float
    seeds: int = 6


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


# --- all five abilities, and larger sizes ---------------------------------------------------------------

_ALL = ("structure", "manipulation", "knowledge", "hops", "breadth")
_ORDERS = ("immediate", "repeat_all", "reverse")
_HOPS = _Ability(
    source="khop:hops=3,min_hops=1,symbols=7,queries=7",
    vocab_size=57,
    length=54,
    shapes=_TINY_33K,
    orders=_ORDERS,
    flops=(1.94,),
    steps=500,
    batch_size=16,
    eval_rows=512,
    learning_rates=(2**-8, 2**-7, 2**-6),
    metric="wrong",
    margin=0.05,
    sd=0.04,
)
_BREADTH = dataclasses.replace(
    _HOPS,
    source="breadth:vertices=7,parents=2",
    length=18,
    batch_size=32,
    eval_rows=1024,
    metric="error",  # of whole answers; as a mean over levels, the few rows of the largest would decide
)
_TINY5 = {
    **{ability: dataclasses.replace(_ABILITIES[f"{ability}_tiny"], orders=_ORDERS) for ability in _ALL[:3]},
    "hops": _HOPS,
    "breadth": _BREADTH,
}
# The same with sharing at a second depth.
_SECOND = {"structure": 2.0, "manipulation": 2.0, "knowledge": 1.9, "hops": 1.96, "breadth": 1.96}
_LAPTOP = {
    ability: dataclasses.replace(of, shared=(1, 2), flops=(*of.flops, _SECOND[ability]), seeds=4)
    for ability, of in _TINY5.items()
}
_PAPER_25M: tuple[Shape, ...] = ((4, 11, 704, 2044), (8, 8, 512, 1366), (32, 4, 256, 684))
_PAPER_85M: tuple[Shape, ...] = ((6, 17, 1088, 2888), (12, 12, 768, 2048), (48, 6, 384, 1024))
# Source, vocabulary, length, batch and steps.
_PAPER_TASKS = {
    "structure": ("structure:levels=6,symbols=10,rules=3,grammar=1,tokens=1024", 11, 1024, 128, 20_000),
    "manipulation": ("manipulation:modulus=23,operations=10,operators=3", 26, 21, 1024, 80_000),
    "knowledge": (
        "knowledge:people=500000,attributes=6,values=256,wordings=5,symbols=100,exposures={exposures}",
        386,
        14,
        1000,
        50_000,
    ),
    "hops": ("khop:hops=8,min_hops=1,symbols=225,queries=5,tokens_per_node=2", 31, 1095, 128, 20_000),
    "breadth": ("breadth:vertices=110,parents=4", 12_211, 540, 256, 20_000),
}


def _paper(ability: str, shapes: tuple[Shape, ...], flops_of_breadth: float) -> _Ability:
    """An ability at a size of arXiv 2512.17351, with heads of 64.

    8 x 512, 12 x 768 and the 100 exposures are the paper's; the shapes beside these, the numbers of the
    tasks, batches and steps are ours.
    """
    source, vocab_size, length, batch_size, steps = _PAPER_TASKS[ability]
    return dataclasses.replace(
        _TINY5[ability],
        source=source,
        vocab_size=vocab_size,
        length=length,
        shapes=shapes,
        flops=(flops_of_breadth if ability == "breadth" else 2.0,),
        head_dim=64,
        compute_dtype="auto",
        steps=steps,
        batch_size=batch_size,
        eval_rows=256 if ability == "structure" else 2048,
        exposures=100 if ability == "knowledge" else 0,
        learning_rates=(2**-11, 2**-10, 2**-9),
    )


for _size, _of in {
    "tiny5": _TINY5,
    "laptop": _LAPTOP,
    "paper8x512": {ability: _paper(ability, _PAPER_25M, 1.81) for ability in _ALL},
    "paper12x768": {ability: _paper(ability, _PAPER_85M, 1.91) for ability in _ALL},
}.items():
    _ABILITIES |= {f"{ability}_{_size}": of_ability for ability, of_ability in _of.items()}
COLLECTIONS = {
    "tiny": ("structure_tiny", "manipulation_tiny", "knowledge_tiny"),
    **{
        size: tuple(f"{ability}_{size}" for ability in _ALL)
        for size in ("tiny5", "laptop", "paper8x512", "paper12x768")
    },
}
COLLECTIONS["paper"] = (*COLLECTIONS["paper8x512"], *COLLECTIONS["paper12x768"])
PRESETS = base.presets_of(COLLECTIONS)


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
    config.model.head_dim = ability.head_dim
    config.model.compute_dtype = ability.compute_dtype
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
    train.log_every = train.checkpoint_every = min(ability.steps, 1000)
    train.eval_rows, train.eval_batch_size = ability.eval_rows, min(ability.eval_rows, 1024)
    return config


def studies(preset: str) -> list[str]:
    """Abilities of a collection; an ability is a study itself."""
    return base.members(__file__, COLLECTIONS, preset)


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
        seeds=ability.seeds,
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
