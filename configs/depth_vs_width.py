"""Depth against width at equal size: MobileLLM figure 4 and table 11.

  python -m experiments.sweep --config=configs/depth_vs_width.py:tiny

`tiny` holds the non-embedding parameters equal, which the paper does not: its models hold the total about
equal, so that its deep models also spend more of it outside the embedding. It takes about 2 minutes on 2
CPU cores and trains for 350 steps: it shows the machinery, and what depth does to very small models at the
start of training, at one learning rate that suits some of them better than others. It cannot show what the
paper's 250 billion tokens show.

`small` asks the same of models of about 2M parameters and 66M tokens.

`paper_125m` and `paper_350m` are the paper's exact shapes and recipe, for a pod.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

PRESETS = ("tiny", "small", "paper_125m", "paper_350m")

# depth, num_heads, width
_PAPER = {
    "paper_125m": (
        (4, 20, 1280),
        (6, 16, 1024),
        (8, 14, 896),
        (12, 12, 768),
        (18, 10, 640),
        (24, 9, 576),
        (30, 8, 512),
        (42, 7, 448),
        (62, 6, 384),
    ),
    "paper_350m": (
        (5, 32, 2048),
        (10, 24, 1536),
        (12, 22, 1408),
        (15, 20, 1280),
        (19, 18, 1152),
        (24, 16, 1024),
        (28, 15, 960),
        (32, 14, 896),
        (46, 12, 768),
        (66, 10, 640),
    ),
}
# depth, num_heads, width, ffn_width; F is the multiple of 4 that brings all blocks together closest to
# the size of the third row
_MATCHED = {
    "tiny": ((1, 6, 96, 256), (2, 4, 64, 204), (4, 3, 48, 128), (8, 2, 32, 100)),
    "small": ((2, 8, 256, 688), (4, 6, 192, 432), (8, 4, 128, 344), (16, 3, 96, 216), (32, 2, 64, 168)),
}


def get_config(preset: str = "tiny") -> ConfigDict:
    """Returns what all points have in common."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    if preset in _PAPER:
        base.use_paper_recipe(config)
        config.model.share_embedding = False  # paper: its parameter counts fit untied embeddings only
    else:
        base.use_small_recipe(config, preset)
    return config


def study(preset: str) -> base.Study:
    """Returns what is asked, and how it is answered."""
    paper = preset in _PAPER
    return base.Study(
        question="Is a deep and thin model better than a shallow and wide one of the same size?",
        scientific=("model.depth", "model.width"),
        x="model.depth",
        x_label="distinct blocks (depth)",
        learning_rates=(2**-10, 2**-9, 2**-8) if paper else (2**-9, 2**-7),
        matched="total_parameters" if paper else "non_embedding_parameters",
        tolerance=0.25 if paper else 0.02,
        seeds=5 if preset == "tiny" else 3,
        margin=0.02,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the points."""
    if preset in _PAPER:
        depths, heads, widths = zip(*_PAPER[preset], strict=True)
        yield from base.zipped(model__depth=depths, model__num_heads=heads, model__width=widths)
    else:
        depths, heads, widths, ffns = zip(*_MATCHED[preset], strict=True)
        yield from base.zipped(
            model__depth=depths, model__num_heads=heads, model__width=widths, model__ffn_width=ffns
        )
