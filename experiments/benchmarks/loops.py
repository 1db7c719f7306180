"""Loops: a training step of one block applied several times, against one of as many blocks.

Both apply equally many layers, so that the loop should cost the same: it reads fewer weights, and adds up
their gradients over the uses. Below them is what uses cost that have parameters of their own, see
`model/uses.py`.
"""

from collections.abc import Callable

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from experiments.benchmarks.trainer import Trainer

_LAYERS = 12
_ROWS, _LENGTH = 16, 128
_STEPS = 3  # in a turn


def measure(quick: bool) -> list[m.Line]:
    """Measures milliseconds per step of each model, and ratios to the one without a loop."""
    layers = 2 if quick else _LAYERS
    loop = {"depth": 1, "sharing": "repeat_all", "num_repeats": layers}
    blocks, once = f"{layers} blocks", f"1 block x {layers}"
    models: dict[str, dict[str, object]] = {
        blocks: {"depth": layers},
        once: loop,
        f"{once}, norm gains of each use": {**loop, "loop_gains": True},
        f"{once}, updates of rank 2": {**loop, "loop_rank": 2},
    }
    seconds = m.alternate({name: _step(quick, fields) for name, fields in models.items()}, 2 if quick else 9)
    lines = [
        m.Line(f"{name}: a step", "ms", tuple(1e3 * s / _STEPS for s in of)) for name, of in seconds.items()
    ]
    for name in list(models)[1:]:
        most = 1.02 if name == once else None
        lines.append(
            m.Line(f"{name} / {blocks}", "x", m.ratios(seconds[name], seconds[blocks]), at_most=most)
        )
    return lines


def _step(quick: bool, fields: dict[str, object]) -> Callable[[], object]:
    rows, length = (8, 32) if quick else (_ROWS, _LENGTH)
    trainer = Trainer(config_of("12 x 128", rows, length, quick, **fields))
    batches = trainer.random_batches()
    return lambda: trainer.train(batches, _STEPS)
