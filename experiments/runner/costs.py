"""What a sweep costs: runs, work, memory, hours here and elsewhere, and the seeds that its margin needs."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments.runner.needed import missing
from experiments.runner.points import Point
from experiments.runner.studies import by_study
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.datasheet import PEAK_FLOPS

UTILIZATION = 0.4  # of the peak, by the FLOPs of the model; usual for 125 million parameters and more
_LARGE = 100_000_000  # parameters from which on that is so
_DEVICES = {"A100": "A100", "H100": "H100", "v5e": "TPU v5 lite"}
# For the expected time only, measured on the tiny studies on 2 CPU cores: the share of the matrix rate that
# training reaches, and the seconds that a point (process, compilation) and a run (evaluation, saving) cost.
_EFFICIENCY, _POINT_S, _RUN_S = 0.12, 10.0, 1.2


def costs(points: Sequence[Point], here_s: float | None, here: str) -> str:
    """A line for each kind of cost, and one for each study with the seeds that it needs.

    Args:
      points: what is to run.
      here_s: seconds that all runs take on this machine; None where that is unknown.
      here: the machine, or why it is unknown.
    """
    runs = sum(point.runs for point in points)
    flops = sum(point.runs * point.flops for point in points)
    tokens = sum(point.runs * point.tokens for point in points)
    about = "about " if any(point.learning_rates for point in points) else ""
    largest = max(points, key=memory_bytes)
    small = max(accounting.parameters(point.config.model).total for point in points) < _LARGE
    rows = {
        "all": f"{about}{runs:,} runs, {tokens:.3g} tokens, {flops:.3g} FLOPs of training",
        "memory": f"about {memory_bytes(largest) / 1e9:,.2f} GB for a run of {largest.facts['point']!r} on "
        "one device: parameters, gradients, AdamW, activations",
        "here": f"{'not known' if here_s is None else f'about {_time(here_s)}'}, {here}",
    }
    for name, kind in _DEVICES.items():
        seconds = flops / (UTILIZATION * PEAK_FLOPS[kind])
        at = f"{UTILIZATION:.0%} of {PEAK_FLOPS[kind] / 1e12:.0f} TFLOP/s"
        rows[name] = f"{_time(seconds)} at {at}, training alone"
        if small:
            rows[name] += "; models this small take several times as long"
    if absent := missing(points):
        rows["missing"] = f"{absent[0]} (the work of a teacher is not counted above)"
    said = [f"{name:8}{text}" for name, text in rows.items()]
    return "\n".join(said + [_seeds(name, of_study) for name, of_study in by_study(points).items()])


def memory_bytes(point: Point, runs: int = 1) -> int:
    """Estimated bytes of a run on one device: state and gradients of AdamW, activations, and a teacher.

    Several `runs` in one program share the teacher.
    """
    budgets = accounting.run_budgets(point.config, point.teacher)
    taught_by = 4 * accounting.parameters(point.teacher).total if point.teacher else 0
    return runs * int(budgets["optimizer_bytes"] + budgets["activation_bytes"]) + taught_by


def _time(seconds: int | float) -> str:
    if seconds < 60:
        return "under a minute"
    hours = seconds / 3600
    return (
        f"{seconds / 60:.0f} minutes"
        if hours < 1
        else f"{hours:.1f} hours"
        if hours < 48
        else f"{hours:,.0f} hours"
    )


def _seeds(study: tuple[str, str], points: Sequence[Point]) -> str:
    widest = max((point.facts for point in points), key=lambda facts: facts["plan"]["pairs"])
    sd, pairs, seeds = (widest["plan"][name] for name in ("sd", "pairs", "seeds"))
    line = f"seeds   {':'.join(study)}: {seeds} planned; "
    if sd is None or not pairs:
        why = "the study expects no sd" if pairs else "no pair is compared"
        return f"{line}how many its margin needs is not known, as {why}"
    from mobilellm_jax.analysis.statistics import POWER, seeds_for_equivalence  # here: it loads scipy

    needed = seeds_for_equivalence(sd, pairs, widest["margin"])
    of = f"sd {sd:g}, {pairs} pair{'' if pairs == 1 else 's'}, power {POWER:.0%}"
    return f"{line}equality within {widest['margin']:g} needs about {needed} ({of})"


def expected_seconds(runs: Sequence[tuple[Point, int]]) -> float:
    """Estimated seconds of so many runs of these points, one after the other on all cores.

    From the rate of matrix products, measured here.
    """
    size = 1024
    x = jnp.ones((size, size), runs[0][0].config.model.compute_dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    rate = 2 * size**3 / min(seconds) * jax.device_count()
    training = sum(point.flops * count for point, count in runs) / (rate * _EFFICIENCY)
    return training + len(runs) * _POINT_S + sum(count for _, count in runs) * _RUN_S
