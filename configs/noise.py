"""A/A: the same model under two names. What the protocol calls a difference here is noise.

  python -m experiments.sweep --config=configs/noise.py:tiny

The two points differ in the seeds of their initial parameters and in nothing else: as in every comparison of
two architectures, a pair shares the order of the data and the evaluation rows. In `tiny` both have the same
learning rate; in `tuned` each tunes its own, so that the noise of tuning is part of it. `init` and `data`
have one point each, and show how much of the spread over seeds comes from the initial parameters, and how
much from the order of the data. `dtype` has the same seeds twice, with matrix products in float32 and in
bfloat16: what `compute_dtype="auto"` may change where it stands for bfloat16. `schedule` decays the learning
rate to a tenth along a cosine, and to zero along a line: what an end at zero does to the spread over seeds.
About 3 minutes on 2 CPU cores for `tuned`, 1 minute for each of the others.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base, layer_sharing

_QUESTIONS = {
    "tiny": "How large a difference does the protocol see between a model and itself?",
    "tuned": "How large a difference does it see where the learning rate is tuned twice?",
    "init": "How far do runs spread that differ in their initial parameters only?",
    "data": "How far do runs spread that differ in the order of the data only?",
    "dtype": "How large a difference does the protocol see between float32 and bfloat16?",
    "schedule": "Do runs spread less where the learning rate ends at zero?",
}
PRESETS = tuple(_QUESTIONS)
_DTYPES = ("float32", "bfloat16")
_SCHEDULES = {
    "cosine to a tenth": {"optimizer.schedule": "cosine", "optimizer.final_fraction": 0.1},
    "linear to zero": {"optimizer.schedule": "linear", "optimizer.final_fraction": 0.0},
}
_FIELDS = {"dtype": ("model.compute_dtype",), "schedule": ("optimizer.schedule", "optimizer.final_fraction")}


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config of the baseline of `layer_sharing:tiny`."""
    base.check_preset(__file__, preset, PRESETS)
    return layer_sharing.get_config("tiny")


def study(preset: str) -> base.Study:
    twice = ("A", "A again")
    labels = {"tiny": twice, "tuned": twice, "dtype": _DTYPES, "schedule": list(_SCHEDULES)}
    return base.Study(
        question=_QUESTIONS[preset],
        scientific=_FIELDS.get(preset, ("train.init_seed",)),
        labels=labels.get(preset, ("A",)),
        learning_rates=(2**-8, 2**-7, 2**-6) if preset == "tuned" else (),
        matched="total_parameters",
        tolerance=0.0,
        seeds=8,
        vary=(preset,) if preset in ("init", "data") else ("init", "data"),
        margin=0.05,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    if preset == "dtype":
        yield from base.zipped(model__compute_dtype=_DTYPES)
        return
    if preset == "schedule":
        yield from _SCHEDULES.values()
        return
    yield from base.zipped(train__init_seed=(0, 500_000) if preset in ("tiny", "tuned") else (0,))
