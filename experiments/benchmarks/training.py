"""Training: tokens per second, and utilization of the machine's matrix-product rate.

The dtype is the one that `compute_dtype="auto"` picks. The rate is that of a product of square matrices of
this dtype, measured in the same turns; for known accelerators also the datasheet's. FLOPs are those of the
model, see `accounting.train_flops_per_token`: recomputation by remat and elementwise operations do not count.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import STEPS, chosen, config_of
from experiments.benchmarks.trainer import Trainer
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.datasheet import PEAK_FLOPS
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.model.ops.precision import sum_dtype

# name: rows and tokens of a row on a CPU, and on an accelerator
_SHAPES = {
    "4 x 48": ((8, 64), (256, 64)),
    "12 x 128": ((16, 128), (256, 128)),
    "125m": ((2, 512), (32, 2048)),
    "350m": ((1, 512), (16, 2048)),
}
_SHARED = " immediate x2"
MODELS = tuple(label for name in _SHAPES for label in (name, name + _SHARED))


def measure(quick: bool) -> list[m.Line]:
    """Measures tokens per second and utilization of each shape, without and with sharing."""
    labels = list(MODELS[:2]) if quick else chosen(MODELS)
    return [line for name in _SHAPES for line in _measure(name, labels, quick)]


def _measure(name: str, labels: list[str], quick: bool) -> Iterator[m.Line]:
    on_cpu = jax.default_backend() == "cpu"
    rows, length = (8, 32) if quick else _SHAPES[name][0 if on_cpu else 1]
    fields = {name: {}, name + _SHARED: {"sharing": "immediate", "num_repeats": 2}}
    configs = {
        label: with_dtype(
            config_of(name, rows, length, quick, compute_dtype="auto", **of), jax.default_backend
        )
        for label, of in fields.items()
        if label in labels
    }
    if not configs:
        return
    dtype = next(iter(configs.values())).model.compute_dtype
    steps = 1 if quick else _steps(name)
    product, flops = matrix_product(64 if quick else 2048 if on_cpu else 8192, dtype)
    sides: dict[str, Callable[[], object]] = {"product": product}
    for label, config in configs.items():
        trainer = Trainer(config)
        batches = trainer.random_batches()
        sides[label] = lambda trainer=trainer, batches=batches: trainer.train(batches, steps)
    seconds = m.alternate(sides, 2 if quick else 5 if on_cpu else 3)
    peak = m.rates(flops, seconds["product"])
    yield m.Line(f"{name}: rate of matrix products", "GFLOP/s", tuple(rate / 1e9 for rate in peak))
    kind = jax.devices()[0].device_kind
    datasheet = next((rate for key, rate in PEAK_FLOPS.items() if key in kind), None)
    for label, config in configs.items():
        tokens = m.rates(steps * rows * length, seconds[label])
        size = f"{label}, {rows} x {length} tokens, {config.model.compute_dtype}"
        yield m.Line(f"{size}: tokens per second", "tokens/s", tokens)
        per_token = accounting.train_flops_per_token(config.model, length)
        used = m.ratios([per_token * rate for rate in tokens], peak)
        wanted = 85.0 if on_cpu and label == "125m" else None
        share = tuple(100 * share for share in used)
        yield m.Line(f"{size}: share of that rate", "%", share, at_least=wanted)
        if datasheet:
            wanted = {"125m": 50.0, "350m": 55.0}.get(label)
            share = tuple(100 * per_token * rate / datasheet for rate in tokens)
            yield m.Line(f"{size}: share of {datasheet / 1e12:.0f} TFLOP/s", "%", share, at_least=wanted)


def _steps(name: str) -> int:
    """Number of steps in a turn."""
    return STEPS.get(name, 1) if jax.default_backend() == "cpu" else 10


def matrix_product(size: int, dtype: str) -> tuple[Callable[[], object], float]:
    """Builds a call that multiplies square matrices several times, and computes its FLOPs."""
    times = 8
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)

    @jax.jit
    def multiply(a: jax.Array) -> jax.Array:
        def once(_: jax.Array, b: jax.Array) -> jax.Array:
            return (jnp.dot(a, b, preferred_element_type=sum_dtype(a.dtype)) / size).astype(a.dtype)

        return jax.lax.fori_loop(0, times, once, a)

    return lambda: jax.block_until_ready(multiply(a)), times * 2 * float(size) ** 3
