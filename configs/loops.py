"""Loops: one block applied R times, what its uses may have of their own, and R blocks. Which closes the gap?

  python -m experiments.sweep --config=configs/loops.py:tiny

`model/uses.py` says what uses can have: norm gains, low-rank updates of the matrices (relaxed recursive
transformers), factors on the residual branches, a vector added as each loop begins, a norm of the state
between loops. Each is compared with the plain loop and with R blocks, in three abilities of the playground:
operations (nested arithmetic) and hops (lookups in a row) take computation, bits (facts drawn at random) take
parameters. Parameters differ on purpose: R blocks have R times as many, rank 2 a third more, the others next
to none. All see the same tokens, R loops cost the FLOPs of R blocks, and every rate is tuned.

`tiny` has the extras at R = 4, plain loops of R = 2, and 8 but for hops; it should take about 25 minutes of
one CPU core. Steps are such that four blocks neither know it all nor next to nothing. In one trial each,
with untuned rates, 31 % of operations were wrong after 600 steps of one block (400 here), 5.7 % of a block
four times and 2.7 % of four blocks; 47 % and 41 % of hops; 21 % of bits were forgotten by four blocks, and
74 % by a block eight times. `laptop` has all extras at all R; a loop whose count is drawn at each step of
training, for `sweep --num_repeats=1,2,4,8`; and `text`, with extras at R = 4, on text such as the novels of
configs/shape_laws.py by --config.data.source. It reads bytes: in a trial of 1,000 steps one block came below
the trigram there (1.82 nats a byte, 1.94), but not in tokens of bpe:512 (3.63, 3.19), where architecture can
hardly be judged. A trigram of bytes is a low bar: it sees two letters.

What it cannot show: loops of several blocks (configs/middle_loop.py), and models that are converted to loops
instead of trained with them.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import base, playground

# Ability -> the study of the playground with its task, steps, and heads, width and ffn width of a block.
_ABILITIES = {
    "operations": ("manipulation_tiny5", 400, (2, 38, 100)),
    "hops": ("hops_tiny5", 500, (2, 38, 100)),
    "bits": ("knowledge_tiny5", 800, (1, 20, 46)),
}
_TEXT = (2, 64, 168)
_EXTRAS: dict[str, base.Overrides] = {
    "gains": {"model.loop_gains": True},
    "rank 2": {"model.loop_rank": 2},
    "scales": {"model.loop_scale": "learned"},
    "vectors": {"model.loop_embedding": True},
    "norm": {"model.loop_norm": True},
}
_PLAIN = {
    "model.loop_gains": False,
    "model.loop_rank": 0,
    "model.loop_scale": "",
    "model.loop_embedding": False,
    "model.loop_norm": False,
    "train.loops": "",
}
COLLECTIONS = {
    "tiny": tuple(f"{ability}_tiny" for ability in _ABILITIES),
    "laptop": tuple(f"{ability}_laptop" for ability in (*_ABILITIES, "text")),
}
PRESETS = base.presets_of(COLLECTIONS)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share; of a collection, the fields that can be set on the command line."""
    base.check_preset(__file__, preset, PRESETS)
    if preset in COLLECTIONS:
        return base.get_config()
    ability, _ = preset.split("_")
    if ability == "text":
        config, shape = base.get_config(), _TEXT
        base.use_small_recipe(config, "tiny")
        config.data.tokenizer, config.data.sequence_length = "bytes", 128
        config.model.vocab_size = 260
        use_steps(config, 500)
    else:
        task, steps, shape = _ABILITIES[ability]
        config = playground.get_config(task)
        use_steps(config, steps)
    heads, width, ffn_width = shape
    base.use_base_shape(config, 1, width)
    config.model.depth, config.model.num_heads, config.model.width = 1, heads, width
    config.model.ffn_width = ffn_width
    return config


def use_steps(config: ConfigDict, steps: int) -> None:
    """Sets the length of training, and a tenth of it as warm-up."""
    train = config.train
    config.optimizer.warmup_steps = round(0.1 * steps)
    train.steps = train.log_every = train.checkpoint_every = steps
    train.eval_every = steps // 2


def studies(preset: str) -> list[str]:
    """Abilities of a collection; an ability is a study itself."""
    return base.members(__file__, COLLECTIONS, preset)


def study(preset: str) -> base.Study:
    ability, _ = preset.split("_")
    counts, with_extras = _counts(preset)
    pairs = [(loop(count), f"{count} blocks") for count in counts]
    pairs += [(loop(count), "1 block") for count in counts]
    for count in with_extras:
        extras = [f"{loop(count)}, {name}" for name in _extras(preset, count)]
        pairs += [(extra, other) for other in (loop(count), f"{count} blocks") for extra in extras]
    return base.Study(
        question=f"What closes the gap between one block in a loop and as many blocks, for {ability}?",
        scientific=("model.depth", "model.sharing", *_PLAIN),
        labels=[label for label, _ in _rows(preset)],
        baseline="1 block",
        pairs=pairs,
        arms=base.COMPLETEP,
        matched="tokens",  # parameters are what the designs differ in
        tolerance=0.0,
        seeds=4,
        **_measured(ability),
    )


def _measured(ability: str) -> dict[str, Any]:
    if ability == "text":
        return {"learning_rates": (2**-8, 2**-7, 2**-6), "margin": 0.02, "sd": 0.015}
    of = playground.study(_ABILITIES[ability][0])
    return {"learning_rates": of.learning_rates, "metric": of.metric, "margin": of.margin, "sd": of.sd}


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    for _, row in _rows(preset):
        yield row


def _rows(preset: str) -> Iterator[tuple[str, base.Overrides]]:
    counts, with_extras = _counts(preset)
    yield "1 block", _row("none")
    for count in counts:
        yield f"{count} blocks", _row("none", depth=count)
        yield loop(count), _row("immediate", repeats=count)
    for count in with_extras:
        for name, extra in _extras(preset, count).items():
            yield f"{loop(count)}, {name}", {**_row("immediate", repeats=count), **extra}


def _extras(preset: str, count: int) -> dict[str, base.Overrides]:
    """By name, what a loop of so many uses is also trained with."""
    drawn = {"drawn": {"train.loops": f"1..{count}"}} if preset.endswith("laptop") and count > 2 else {}
    return {**_EXTRAS, **drawn}


def _counts(preset: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of loops, and of those with extras."""
    if preset.endswith("laptop"):
        return (2, 4, 8), ((4,) if preset == "text_laptop" else (2, 4, 8))
    return ((2, 4) if preset == "hops_tiny" else (2, 4, 8)), (4,)


def _row(sharing: str, depth: int = 1, repeats: int = 1) -> base.Overrides:
    return {"model.depth": depth, "model.sharing": sharing, "model.num_repeats": repeats, **_PLAIN}


def loop(count: int) -> str:
    """Label of a block that is applied so often."""
    return f"1 block x {count}"
