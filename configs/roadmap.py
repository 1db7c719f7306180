"""The road from the baseline to MobileLLM-LS, step by step: MobileLLM figure 3 and table 10.

  python -m experiments.sweep --config=configs/roadmap.py:tiny

Each point keeps what the one before it has changed: ReLU, SwiGLU, deep and thin, tied embeddings,
grouped-query attention (with the width that it pays for), immediate layer sharing. They are compared step by
step. The paper's sizes are equal within 14 %, and so are the twins', which keep its ratios: 2.5 times the
depth, 2/3 of the width, an embedding of 3/8 of all parameters, 3 heads for each key/value head.

What the twins cannot show: heads of size 8 and 16 instead of 64, no rare words, and at `tiny` 2 to 5 blocks
and 350 steps, the start of training. Note that the scores of the paper's own baseline at 125M are those of
the public OPT-125M, so its first step there may compare two training recipes.
"""

from collections.abc import Iterator
from itertools import pairwise

from ml_collections import ConfigDict

from configs import base

# Two shapes for the first two steps, one for the next two, one for the last two: the baseline with ReLU, with
# SwiGLU, deep and thin, grouped. depth, num_heads, num_kv_heads, width, ffn_width (None: the rule in base.py)
_SHAPES = {
    "tiny": ((2, 8, 8, 64, 256), (2, 8, 8, 64, 172), (5, 5, 5, 40, 152), (5, 6, 2, 48, 132)),
    "small": ((4, 16, 16, 256, 1024), (4, 16, 16, 256, 684), (10, 10, 10, 160, 608), (10, 12, 4, 192, 532)),
    "paper_125m": (
        (12, 12, 12, 768, None),
        (12, 12, 12, 768, None),
        (30, 8, 8, 512, None),
        (30, 9, 3, 576, None),
    ),
    "paper_350m": (
        (15, 20, 20, 1280, None),
        (15, 20, 20, 1280, None),
        (32, 14, 14, 896, None),
        (32, 15, 5, 960, None),
    ),
}
PRESETS = tuple(_SHAPES)
_STEPS = (
    "ReLU baseline",
    "+ SwiGLU",
    "+ deep and thin",
    "+ tied embeddings",
    "+ grouped queries",
    "+ layer sharing",
)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    if not preset.startswith("paper"):
        depth, _, _, width, _ = _SHAPES[preset][0]
        base.use_base_shape(config, depth, width)
    return config


def study(preset: str) -> base.Study:
    return base.Study(
        question="What does each step from the baseline to MobileLLM-LS bring?",
        scientific=(
            "model.ffn_kind",
            "model.depth",
            "model.width",
            "model.share_embedding",
            "model.num_kv_heads",
            "model.sharing",
        ),
        labels=_STEPS,
        pairs=[(later, earlier) for earlier, later in pairwise(_STEPS)],
        matched="total_parameters",
        tolerance=0.16,
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    relu, swiglu, deep, grouped = _SHAPES[preset]
    depths, heads, kv_heads, widths, ffns = zip(relu, swiglu, deep, deep, grouped, grouped, strict=True)
    yield from base.zipped(
        model__depth=depths,
        model__num_heads=heads,
        model__num_kv_heads=kv_heads,
        model__width=widths,
        model__ffn_width=ffns,
        model__ffn_kind=("relu", *["swiglu"] * 5),
        model__share_embedding=(False, False, False, True, True, True),
        model__sharing=(*["none"] * 5, "immediate"),
        model__num_repeats=(1, 1, 1, 1, 1, 2),
    )
