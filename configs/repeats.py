"""Repeats: MobileLLM table 14. Every block applied once to four times in a row.

  python -m experiments.sweep --config=configs/repeats.py:tiny

The shapes are those of `layer_sharing.py`, as in the paper. Four times the layers cost nearly four times the
FLOPs, so no point is better for free. 350 steps of a 3-block model, `tiny`, cannot show differences like
the paper's, 0.4 to 0.8 points of zero-shot accuracy from one run each. `small` is the same for 8 blocks.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base, layer_sharing

PRESETS = layer_sharing.PRESETS


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    return layer_sharing.get_config(preset)


def study(preset: str) -> base.Study:
    return base.Study(
        question="How often is every block to be applied?",
        scientific=("model.sharing", "model.num_repeats"),
        labels=("x1", "x2", "x3", "x4"),
        x="model.num_repeats",
        x_label="times each block is applied in a row",
        baseline="x1",
        matched="non_embedding_parameters",
        tolerance=0.0,
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    yield from base.zipped(
        model__sharing=("none", "immediate", "immediate", "immediate"), model__num_repeats=(1, 2, 3, 4)
    )
