"""Embedding sharing: MobileLLM table 1. Untied, tied, and tied with the saved parameters spent on depth.

  python -m experiments.sweep --config=configs/embedding_sharing.py:tiny

Tying saves 12 % of all parameters in the paper, and about as much in the twins. The third point has two
blocks more than 30; at `tiny` one more than 8, the smallest step there is, which gives back more of what was
saved (13.7 of 16.4 thousand) than in the paper (6.8 of 16.4 million).

`tiny` has a vocabulary of 512, of which every entry is seen often; `small` 4,096. Neither can show what tying
does to the rare entries of a vocabulary of 32,000. The paper has this table at 125M only.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

# depth, blocks more, num_heads, width, ffn_width (None: the rule in base.py)
_SHAPES = {
    "tiny": (8, 1, 2, 32, 100),
    "small": (24, 2, 3, 96, 216),
    "paper_125m": (30, 2, 8, 512, None),
}
PRESETS = tuple(_SHAPES)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    depth, _, config.model.num_heads, config.model.width, config.model.ffn_width = _SHAPES[preset]
    if not preset.startswith("paper"):
        base.use_base_shape(config, depth, config.model.width)
    return config


def study(preset: str) -> base.Study:
    more = _SHAPES[preset][1]
    return base.Study(
        question="Does it pay to tie input and output embeddings, and to spend what that saves on depth?",
        scientific=("model.share_embedding", "model.depth"),
        labels=("untied", "tied", f"tied, {more} more block{'s' if more > 1 else ''}"),
        baseline="untied",
        matched="total_parameters",
        tolerance=0.15,
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    depth, more, *_ = _SHAPES[preset]
    yield from base.zipped(
        model__share_embedding=(False, True, True), model__depth=(depth, depth, depth + more)
    )
