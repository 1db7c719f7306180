"""Depth against width, and sharing, at equal latency: the question that MobileLLM leaves open.

  python -m experiments.sweep --config=configs/latency_matched.py:tiny
  python -m experiments.latency --table=experiments/latency/amd_epyc.json \\
      --config=configs/latency_matched.py:tiny            # these designs, predicted beside measured

The paper compares depth and width at equal size, and argues for immediate sharing by its latency on a phone:
1.03 times that of half the layers (table 7). It never holds the latency equal. Here every design makes a
token in about the same time, as the table of one CPU core predicts. Sizes and training FLOPs then differ on
purpose, and the report shows both: a layer costs time of its own, so the deep design is small, and a block
that is used again at once costs less time than another one.

`tiny` has a wide, a deep, and a shared design, under both parameterizations: 48 runs, 16 minutes on one CPU
core beside other work. Where models are as small as here, most of the time of a
token is not spent on weights but on starting work, so this says little of larger models. The shapes are from

  python -m experiments.shapes --budget=decode_ms:0.0808 --latency=experiments/latency/amd_epyc.json \\
      --depth=2,4 --head_dim=14,16,18,20 --ffn_band=0.3 --config=configs/latency_matched.py:tiny

and the same with --depth=2, --config.model.sharing=immediate and --config.model.num_repeats=2. After another
measurement of the table they have to be found anew; the tolerance is the error that its fit may have.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

PRESETS = ("tiny",)
# depth, num_heads, width, ffn_width, sharing
_SHAPES = {
    "wide": (2, 9, 144, 428, "none"),
    "deep": (4, 4, 64, 180, "none"),
    "shared": (2, 4, 72, 204, "immediate"),  # 4 layers
}


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    model = config.model
    model.depth, model.num_heads, model.width, model.ffn_width, _ = _SHAPES["wide"]
    base.use_base_shape(config, model.depth, model.width)
    return config


def study(preset: str) -> base.Study:
    return base.Study(
        question="Is a deep, a wide or a shared model better at the same time for a token?",
        scientific=("model.depth", "model.width", "model.sharing"),
        labels=tuple(_SHAPES),
        pairs=(("deep", "wide"), ("shared", "wide"), ("shared", "deep")),
        matched="decode_ms",
        latency="experiments/latency/amd_epyc.json",
        tolerance=0.1,
        **base.protocol(preset),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    depths, heads, widths, ffns, sharing = zip(*_SHAPES.values(), strict=True)
    yield from base.zipped(
        model__depth=depths,
        model__num_heads=heads,
        model__width=widths,
        model__ffn_width=ffns,
        model__sharing=sharing,
        model__num_repeats=[1 if plan == "none" else 2 for plan in sharing],
    )
