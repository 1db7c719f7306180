"""Later models that took up the shape: SmolLM-135M and 360M, MobileLLM-R1-140M, 360M and 950M.

  python -m experiments.sweep --config=configs/followups.py:tiny

SmolLM has MobileLLM's shapes with a vocabulary of 49,152; R1 is shallower and wider, with the 128,256 entries
of Llama 3. `paper_smollm` and `paper_r1` have these shapes and, for want of better, MobileLLM's recipe: their
data and schedules are not reproduced. They are two presets, since losses per token of different vocabularies
cannot be compared.

The twins, `tiny` and `small`, have 1/16 and 1/4 of the widths with as many heads, 1/7.5 and 1/2.5 of the
blocks, and one vocabulary for all. So they compare the shapes of the blocks, in order of their size, and
cannot show what the vocabularies do.
"""

from collections.abc import Iterator
from itertools import pairwise

from ml_collections import ConfigDict

from configs import base

# depth, num_heads, num_kv_heads, width, ffn_width
_SMOLLM = {"SmolLM-135M": (30, 9, 3, 576, 1536), "SmolLM-360M": (32, 15, 5, 960, 2560)}
_R1 = {
    "MobileLLM-R1-140M": (15, 9, 3, 576, 2048),
    "MobileLLM-R1-360M": (15, 16, 4, 1024, 4096),
    "MobileLLM-R1-950M": (22, 24, 6, 1536, 6144),
}
_MODELS = {
    "tiny": _SMOLLM | _R1,
    "small": _SMOLLM | _R1,
    "paper_smollm": _SMOLLM,
    "paper_r1": _R1,
}
_SHRINK = {"tiny": (7.5, 16), "small": (2.5, 4), "paper_smollm": (1, 1), "paper_r1": (1, 1)}  # depth, width
_VOCABULARY = {"paper_smollm": 49_152, "paper_r1": 128_256}
PRESETS = tuple(_MODELS)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    if preset in _VOCABULARY:
        config.model.vocab_size = _VOCABULARY[preset]
        config.data.tokenizer = f"bpe:{_VOCABULARY[preset]}"
    else:
        smallest = next(sweep(preset))
        base.use_base_shape(config, smallest["model.depth"], smallest["model.width"])
    return config


def study(preset: str) -> base.Study:
    names = list(_MODELS[preset])
    return base.Study(
        question="Which of the shapes that followed MobileLLM learns most from the same tokens?",
        scientific=("model.depth", "model.num_heads", "model.num_kv_heads", "model.width", "model.ffn_width"),
        labels=names,
        pairs=[(later, earlier) for earlier, later in pairwise(names)],
        matched="tokens",
        tolerance=0.0,
        **base.protocol(preset, seeds=3),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    shallower, thinner = _SHRINK[preset]
    depths, heads, kv_heads, widths, ffns = zip(*_MODELS[preset].values(), strict=True)
    yield from base.zipped(
        model__depth=[round(depth / shallower) for depth in depths],
        model__num_heads=heads,
        model__num_kv_heads=kv_heads,
        model__width=[width // thinner for width in widths],
        model__ffn_width=[ffn // thinner for ffn in ffns],
    )
