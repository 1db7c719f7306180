"""Layer sharing: MobileLLM table 2. None, immediate, repeat-all-over and reverse, every block applied twice.

  python -m experiments.sweep --config=configs/layer_sharing.py:tiny

All points have the same blocks; the three that share apply them twice, and so cost about twice the FLOPs of
the baseline. Their plans differ in order only. `tiny` takes about 10 minutes on 2 CPU cores for both
parameterizations. After 350 steps its models are worse than a trigram counted on the same tokens, and the
answer depends on the parameterization: better under completep, worse under standard.

`small` is the same for 8 blocks. `paper_125m` and `paper_350m` are the shapes of table 2 (8 and 15 blocks).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

# depth, num_heads, width, ffn_width (None: the rule in base.py)
_SHAPES = {
    "tiny": (3, 4, 56, 144),
    "small": (8, 4, 128, 344),
    "paper_125m": (8, 16, 896, None),  # paper appendix E: 16 heads, head size 56
    "paper_350m": (15, 16, 1280, None),  # the same: head size 80
}
PRESETS = tuple(_SHAPES)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    model = config.model
    model.share_embedding = False  # as in the paper, whose counts fit untied embeddings only
    model.depth, model.num_heads, model.width, model.ffn_width = _SHAPES[preset]
    if not preset.startswith("paper"):
        base.use_base_shape(config, model.depth, model.width)
    return config


def study(preset: str) -> base.Study:
    return base.Study(
        question="Does applying every block twice help, and in which order?",
        scientific=("model.sharing",),
        baseline="none",
        matched="non_embedding_parameters",
        tolerance=0.0,
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    sharing = ("none", "immediate", "repeat_all", "reverse")
    yield from base.zipped(model__sharing=sharing, model__num_repeats=(1, 2, 2, 2))
