"""Repeats: MobileLLM table 14. Every block applied once to four times in a row.

  python -m experiments.sweep --config=configs/repeats.py:tiny

The shapes are those of `layer_sharing.py`, as in the paper. Four times the layers cost nearly four times the
FLOPs, so no point is better for free: each has two controls, as many blocks as layers, and the blocks used
once trained for as many FLOPs. `tiny` takes about 40 minutes on 2 CPU cores for both parameterizations; 350
steps of a 3-block model cannot show differences like the paper's, 0.4 to 0.8 points of zero-shot accuracy
from one run each. `small` is the same for 8 blocks. The paper's shapes are without controls, as there.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base, layer_sharing

PRESETS = layer_sharing.PRESETS
_TIMES = (2, 3, 4)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    return layer_sharing.get_config(preset)


def study(preset: str) -> base.Study:
    controls = [(f"x{times}", control) for times in _TIMES for control in _controls(preset, times)]
    fields = ("model.sharing", "model.num_repeats")
    return base.Study(
        question="How often is every block to be applied?",
        scientific=(*fields, "model.depth", "train.steps") if controls else fields,
        labels=["x1", *(f"x{times}" for times in _TIMES), *(control for _, control in controls)],
        pairs=[(f"x{times}", "x1") for times in _TIMES] + controls,
        controls=[control for _, control in controls],
        matched="non_embedding_parameters",
        tolerance=0.0,
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    yield {"model.sharing": "none", "model.num_repeats": 1}
    for times in _TIMES:
        yield {"model.sharing": "immediate", "model.num_repeats": times}
    for times in _TIMES:
        yield from _controls(preset, times).values()


def _controls(preset: str, times: int) -> dict[str, base.Overrides]:
    return layer_sharing.controls(preset, times, f"x1, FLOPs of x{times}")
