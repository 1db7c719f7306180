"""Generation: the latency of a token at batch 1, with shared layers and with as many layers of their own.

A side is a text that goes on in each of its turns; its prompt was read before. The costs of all turns are
equal: attention covers all slots of the cache, filled or not.

The shape is MobileLLM-125M's, whose 0.5 GB of float32 weights fit into no CPU cache; one block, 14 MB, fits
into a large one. That is the paper's reason for immediate sharing, which doubles the layers at 1.03 times the
latency on a phone, against 1.86 times for twice as many blocks (section 3.6, table 7).
"""

from collections.abc import Callable

import jax

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from mobilellm_jax import model
from mobilellm_jax.inference.generate import Generator, Sampling


def measure(quick: bool) -> list[m.Line]:
    """Measures milliseconds per token of each model, and ratios to the unshared one."""
    blocks = 2 if quick else 30
    models = {
        "30 blocks": {},
        "30 blocks, immediate x2": {"sharing": "immediate", "num_repeats": 2},
        "30 blocks, repeat_all x2": {"sharing": "repeat_all", "num_repeats": 2},
        "60 blocks": {"depth": 2 * blocks},
    }
    tokens, turns = (4, 2) if quick else (15, 7)
    sides = {name: _text(quick, tokens, fields) for name, fields in models.items()}
    seconds = m.alternate(sides, turns)
    times = {name: [s / tokens * 1e3 for s in of_side] for name, of_side in seconds.items()}
    plain, most = "30 blocks", 30.0 if jax.default_backend() == "cpu" else None
    lines = [
        m.Line(f"{name}: a token", "ms", tuple(values), at_most=most if name == plain else None)
        for name, values in times.items()
    ]
    for name in list(models)[1:]:
        most = 1.1 if "immediate" in name else None
        lines.append(m.Line(f"{name} / {plain}", "x", m.ratios(times[name], times[plain]), at_most=most))
    return lines


def _text(quick: bool, tokens: int, fields: dict[str, object]) -> Callable[[], None]:
    config = config_of("125m", 1, 128, quick, **fields).model
    params = model.init(jax.random.key(0), config)
    generator = Generator(params, config, Sampling(temperature=0.0, top_k=0, top_p=1.0), context=128)
    text = generator.start([[1]], max_new_tokens=None, eos_id=None, seed=0)
    next(text)

    def call() -> None:
        for _ in range(tokens):
            next(text)

    return call
