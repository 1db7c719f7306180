"""Middle loop: which third of a stack to apply twice?

  python -m experiments.sweep --config=configs/middle_loop.py:tiny

Six blocks, of which two, the first, the middle or the last, are applied twice as a loop, by an explicit plan
(`sharing.py`), beside the six applied once, and eight blocks: as many layers as with a loop, and a third more
parameters. `immediate` has the middle third in the order 2 2 3 3 instead of 2 3 2 3. Two abilities of the
playground, operations and hops. `tiny` should take about 15 minutes of one CPU core. In one trial, six blocks
left 23 % of operations wrong.

`laptop` is the same for 12 blocks, and thirds of four.

What it cannot show: more than two loops, or what uses may have of their own (configs/loops.py).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base, loops, playground

_ABILITIES = {"operations": ("manipulation_tiny5", 300), "hops": ("hops_tiny5", 500)}  # task, and steps
_SHAPE = (2, 26, 62)  # heads, width and ffn width
_DEPTHS = {"tiny": 6, "laptop": 12}
COLLECTIONS = {size: tuple(f"{ability}_{size}" for ability in _ABILITIES) for size in _DEPTHS}
PRESETS = base.presets_of(COLLECTIONS)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share; of a collection, the fields that can be set on the command line."""
    base.check_preset(__file__, preset, PRESETS)
    if preset in COLLECTIONS:
        return base.get_config()
    ability, size = preset.split("_")
    task, steps = _ABILITIES[ability]
    config = playground.get_config(task)
    loops.use_steps(config, steps)
    config.model.num_heads, config.model.width, config.model.ffn_width = _SHAPE
    config.model.depth = _DEPTHS[size]
    base.use_base_shape(config, _DEPTHS[size], config.model.width)
    return config


def studies(preset: str) -> list[str]:
    """Abilities of a collection; an ability is a study itself."""
    return base.members(__file__, COLLECTIONS, preset)


def study(preset: str) -> base.Study:
    ability, size = preset.split("_")
    depth, of = _DEPTHS[size], playground.study(_ABILITIES[ability][0])
    once, deep = f"{depth} blocks", f"{depth * 4 // 3} blocks"
    looped = [label for label, _ in _rows(preset) if label not in (once, deep)]
    middle = "middle third twice"
    return base.Study(
        question=f"Which third of a stack is worth applying twice, for {ability}?",
        scientific=("model.depth", "model.sharing"),
        labels=[label for label, _ in _rows(preset)],
        baseline=once,
        pairs=[
            *((label, once) for label in (*looped, deep)),
            *((middle, label) for label in (*looped, deep) if label != middle),
        ],
        arms=base.COMPLETEP,
        learning_rates=of.learning_rates,
        matched="non_embedding_parameters",
        tolerance=0.0,
        controls=[deep],
        seeds=4,
        metric=of.metric,
        margin=of.margin,
        sd=of.sd,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    for _, row in _rows(preset):
        yield row


def _rows(preset: str) -> Iterator[tuple[str, base.Overrides]]:
    depth = _DEPTHS[preset.split("_")[1]]
    blocks, third = list(range(depth)), depth // 3
    yield f"{depth} blocks", _row(depth, "none")
    for name, start in (("first", 0), ("middle", third), ("last", 2 * third)):
        end = start + third
        yield f"{name} third twice", _row(depth, _words(blocks[:end] + blocks[start:]))
    in_a_row = [block for block in blocks[third : 2 * third] for _ in range(2)]
    plan = blocks[:third] + in_a_row + blocks[2 * third :]
    yield "middle third twice, immediate", _row(depth, _words(plan))
    yield f"{depth * 4 // 3} blocks", _row(depth * 4 // 3, "none")


def _row(depth: int, sharing: str) -> base.Overrides:
    return {"model.depth": depth, "model.sharing": sharing}


def _words(plan: list[int]) -> str:
    return " ".join(map(str, plan))
