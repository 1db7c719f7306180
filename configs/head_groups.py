"""Heads and key/value heads: MobileLLM figure 5 and table 13. 8 to 32 heads over ever fewer key/value heads.

  python -m experiments.sweep --config=configs/head_groups.py:tiny

Depth and width are the same for all points; the head size follows from the number of heads, so that fewer
key/value heads save parameters, up to 10 % in the paper and at `tiny`, and cache. The points are compared
with 16 heads, the paper's choice.

`tiny` has the paper's numbers of heads at width 64, so that heads are only 2 to 8 wide: what it says about
32 heads is about very small heads. It takes about 7 minutes on 2 CPU cores. `small` has head sizes 8 to 32.
`paper_125m` and `paper_350m` are the rows of table 13, with head sizes 28 to 160. Attention is written in
plain matrix products, which take every even head size on every backend.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

# depth, width, ffn_width (None: the rule in base.py)
_SHAPES = {
    "tiny": (2, 64, 184),
    "small": (6, 256, 732),
    "paper_125m": (8, 896, None),
    "paper_350m": (15, 1280, None),
}
PRESETS = tuple(_SHAPES)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    config.model.share_embedding = False  # as in the paper, whose counts fit untied embeddings only
    config.model.depth, config.model.width, config.model.ffn_width = _SHAPES[preset]
    if not preset.startswith("paper"):
        base.use_base_shape(config, config.model.depth, config.model.width)
    return config


def study(preset: str) -> base.Study:
    protocol = base.protocol(preset, seeds=6 if preset == "tiny" else 3)
    if protocol["arms"]:
        protocol["arms"] = base.COMPLETEP  # every point has the base shape, where it is standard as well
    return base.Study(
        question="How many heads, and how many key/value heads?",
        scientific=("model.num_heads", "model.num_kv_heads"),
        x="model.num_kv_heads",
        x_label="key/value heads",
        series="model.num_heads",
        series_label="heads",
        baseline="16 x 16",
        matched="total_parameters",
        tolerance=0.15,
        **protocol,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point: all key/value heads that divide the heads in powers of 2."""
    for heads in (32, 16, 8):
        groups = [heads // 2**i for i in range(heads.bit_length())]
        yield from base.product(model__num_heads=(heads,), model__num_kv_heads=groups)
