"""Depth against width at equal size: MobileLLM figure 4 and table 11.

  python -m experiments.sweep --config=configs/depth_vs_width.py:tiny

`tiny` and `small` hold the non-embedding parameters equal, which the paper does not: its models hold the
total about equal, so that its deep models also spend more of it outside the embedding. Every point gets its
own learning rate. `tiny` trains 111,000 parameters for 350 steps, about 8 minutes on 2 CPU cores for both
parameterizations: it shows the protocol, and what depth does to very small models at the start of training,
where they are worse than a trigram counted on the same tokens.

`small` asks the same of models of about 2M parameters and 66M tokens, on a GPU. How the answer changes with
size and horizon is the question of `shape_laws.py`.

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
# depth, num_heads, width, ffn_width, chosen by hand; those of other sizes are found by
#   python -m experiments.shapes --budget=non_embedding_parameters:110k --depth=1,2,4,8 --head_dim=16 \
#       --ffn_band=0.25 --config.model.ffn_width=344
_MATCHED = {
    "tiny": ((1, 6, 96, 256), (2, 4, 64, 204), (4, 3, 48, 128), (8, 2, 32, 100)),
    "small": ((2, 8, 256, 688), (4, 6, 192, 432), (8, 4, 128, 344), (16, 3, 96, 216), (32, 2, 64, 168)),
}


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    config.model.share_embedding = False  # as in the paper, whose counts fit untied embeddings only
    if preset in _PAPER:
        base.use_paper_recipe(config)
    else:
        base.use_small_recipe(config, "small" if preset == "small" else "tiny")
        depth, _, width, _ = _MATCHED[preset][1]
        base.use_base_shape(config, depth, width)
    return config


def study(preset: str) -> base.Study:
    paper = preset in _PAPER
    shallowest = next(sweep(preset))
    return base.Study(
        question="Is a deep and thin model better than a shallow and wide one of the same size?",
        scientific=("model.depth", "model.width"),
        x="model.depth",
        x_label="distinct blocks (depth)",
        matched="total_parameters" if paper else "non_embedding_parameters",
        tolerance=0.25 if paper else 0.02,
        baseline=f"{shallowest['model.depth']} x {shallowest['model.width']}",
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    if preset in _PAPER:
        depths, heads, widths = zip(*_PAPER[preset], strict=True)
        yield from base.zipped(model__depth=depths, model__num_heads=heads, model__width=widths)
    else:
        depths, heads, widths, ffns = zip(*_MATCHED[preset], strict=True)
        yield from base.zipped(
            model__depth=depths, model__num_heads=heads, model__width=widths, model__ffn_width=ffns
        )
