"""Quantization: MobileLLM table 15, and whether a shared or a deep model suffers more from few bits.

  python -m experiments.sweep --config=configs/quantization.py:tiny --quantize=w8a8,w4:32,w3:32

Compared is the gap, loss after quantization minus loss before it, so every run is its own control. W8A8 alone
cannot tell designs apart, as its gap is next to nothing: w4:32 and w3:32 stand beside it.

`tiny` has the orders of layer sharing at equal blocks, every block applied twice, and a deep and a shallow
design of the size of the baseline. All widths are multiples of 32, so that groups divide them. The six points
apply 34 layers in all, those of `layer_sharing:tiny` 60: it should take about half as long (not measured). It
cannot show the outliers in activations that large, long-trained models have, for which W8A8 is hard.

`paper_125m` and `paper_350m` are the rows of table 15: the models of table 9 with and without layer sharing,
0.25T tokens; gaps of 0.2 and 0.3, and of 0.0 and 0.4 points of accuracy (--tasks=mobilellm).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

PRESETS = ("tiny", "paper_125m", "paper_350m")
_PAPER = {"paper_125m": (30, 9, 3, 576), "paper_350m": (32, 15, 5, 960)}  # depth, heads, kv heads, width
_SHARING = ("none", "immediate", "repeat_all", "reverse")
_BASE = (3, 4, 64, 192)  # depth, num_heads, width, ffn_width
_DEEP, _SHALLOW = (12, 2, 32, 96), (1, 6, 96, 416)  # heads of size 16 in all three


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    model = config.model
    if preset in _PAPER:
        model.depth, model.num_heads, model.num_kv_heads, model.width = _PAPER[preset]
    else:
        model.depth, model.num_heads, model.width, model.ffn_width = _BASE
        base.use_base_shape(config, model.depth, model.width)
    return config


def study(preset: str) -> base.Study:
    question = "Is a shared or a deep model more fragile under quantization?"
    protocol = base.protocol(preset)
    if preset in _PAPER:
        size = preset.removeprefix("paper_").upper()
        return base.Study(
            question=question,
            scientific=("model.sharing",),
            labels=(f"MobileLLM-{size}", f"MobileLLM-LS-{size}"),
            matched="non_embedding_parameters",
            tolerance=0.0,
            **protocol,
        )
    return base.Study(
        question=question,
        scientific=("model.sharing", "model.depth", "model.width"),
        labels=(*_SHARING, "deep", "shallow"),
        pairs=[*((name, "none") for name in _SHARING[1:]), ("deep", "shallow")],
        matched="non_embedding_parameters",
        tolerance=0.03,  # groups of 32 leave no shallow width that is closer
        **{**protocol, "arms": base.COMPLETEP},
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    if preset in _PAPER:
        yield from base.zipped(model__sharing=("none", "immediate"), model__num_repeats=(1, 2))
        return
    shapes = [*[_BASE] * len(_SHARING), _DEEP, _SHALLOW]
    depths, heads, widths, ffns = zip(*shapes, strict=True)
    yield from base.zipped(
        model__sharing=(*_SHARING, "none", "none"),
        model__num_repeats=(1, 2, 2, 2, 1, 1),
        model__depth=depths,
        model__num_heads=heads,
        model__width=widths,
        model__ffn_width=ffns,
    )
