"""Layer sharing: MobileLLM table 2. None, immediate, repeat-all-over and reverse, every block applied twice.

  python -m experiments.sweep --config=configs/layer_sharing.py:tiny

All points have the same blocks; the three that share apply them twice, and so cost about twice the FLOPs of
the baseline. Their plans differ in order only. Two controls show what a second use is up against: as many
blocks as layers, and the baseline trained for as many FLOPs. `tiny` takes about 15 minutes on 2 CPU cores for
both parameterizations. After 350 steps its models are worse than a trigram counted on the same tokens.

`small` is the same for 8 blocks. `paper_125m` and `paper_350m` are the shapes of table 2 (8 and 15 blocks),
without controls, as in the paper.
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
_ONCE = {"model.sharing": "none", "model.num_repeats": 1}
_ORDERS = ("immediate", "repeat_all", "reverse")
_AGAIN = {"tiny": 0.8086, "small": 0.8007}  # training FLOPs of a second use of every block, over the first


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
    more = controls(preset)
    return base.Study(
        question="Does applying every block twice help, and in which order?",
        scientific=("model.sharing", "model.depth", "train.steps") if more else ("model.sharing",),
        labels=["none", *_ORDERS, *more],
        pairs=[(order, "none") for order in _ORDERS] + [("immediate", control) for control in more],
        controls=list(more),
        matched="non_embedding_parameters",
        tolerance=0.0,
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    yield _ONCE
    yield from base.zipped(model__sharing=_ORDERS, model__num_repeats=(2, 2, 2))
    yield from controls(preset).values()


def controls(preset: str, times: int = 2, longer: str = "none, equal FLOPs") -> dict[str, base.Overrides]:
    """What `times` uses of every block are up against, both without sharing; {} at the paper's sizes.

    By label: as many blocks as layers, and, with the label `longer`, training for as many FLOPs.
    """
    if preset not in _AGAIN:
        return {}
    config = get_config(preset)
    blocks, flops = times * config.model.depth, 1 + (times - 1) * _AGAIN[preset]
    return {
        f"{blocks} blocks": {**_ONCE, "model.depth": blocks},
        longer: {**_ONCE, "train.steps": round(flops * config.train.steps)},
    }
