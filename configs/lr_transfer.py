"""Does one learning rate suit all shapes? Loss against learning rate over depth and width.

  python -m experiments.sweep --config=configs/lr_transfer.py:depth_completep

`depth_*` goes from 2 to 32 layers at width 64, `width_*` from 64 to 512 at 2 layers, each with its learning
rate tuned, under the parameterization in the preset's name. Under `completep` the best rates should agree
within a factor of 2 (Dey et al. 2025, figure 2); under `standard` they need not. The base shape is 2 x 64.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

PARAMETERIZATIONS = ("completep", "mup", "standard")
PRESETS = tuple(f"{axis}_{name}" for axis in ("depth", "width") for name in PARAMETERIZATIONS)


def get_config(preset: str = PRESETS[0]) -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_small_recipe(config, "tiny")
    return base.update(
        config,
        {
            "model.parameterization": preset.partition("_")[2],
            "model.base_width": 64,
            "model.base_depth": 2,
            # Near 1 / sqrt(width): from 0.02, the branches of deep stacks learn next to nothing at any rate.
            "model.init_std": 0.1,
        },
    )


def study(preset: str) -> base.Study:
    axis, _, parameterization = preset.partition("_")
    return base.Study(
        question=f"Does the best learning rate stay where it is as {axis} grows, under {parameterization}?",
        scientific=("model.depth", "model.width"),
        x=f"model.{axis}",
        x_label="distinct blocks (depth)" if axis == "depth" else "width",
        learning_rates=(2**-9, 2**-8, 2**-7, 2**-6, 2**-5),
        matched="tokens",
        tolerance=0.0,
        seeds=2,
        baseline="2 x 64",
        margin=0.05,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point: head size 16, feed-forward width twice the width."""
    if preset.startswith("depth"):
        yield from base.product(
            model__depth=(2, 4, 8, 16, 32), model__width=(64,), model__num_heads=(4,), model__ffn_width=(128,)
        )
    else:
        widths = (64, 128, 256, 512)
        yield from base.zipped(
            model__depth=[2] * len(widths),
            model__width=widths,
            model__num_heads=[width // 16 for width in widths],
            model__ffn_width=[2 * width for width in widths],
        )
