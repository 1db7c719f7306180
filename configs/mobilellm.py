"""The published models: MobileLLM table 9, and the layer-sharing models of table 10.

  python -m experiments.train --config=configs/mobilellm.py:125m --workdir=runs/125m
 --config.data.source=files:'corpus/*.jsonl.zst' --config.data.tokenizer=sentencepiece:tokenizer.model
  python -m experiments.sweep --config=configs/mobilellm.py:tiny

The paper trained on 32 A100 for 3 (125m) to 18 (1.5b) days. `ls_*` apply every block twice in a row. A preset
with the name of a model is that model; `paper` is all seven of them as a study, `tiny` and `small` are twins
of it: 1/16 and 1/4 of the widths with as many heads, a tenth and a third of the blocks. They show how the
loss falls with size; being different in size, they say nothing about shape.
"""

from collections.abc import Iterator
from itertools import pairwise

from ml_collections import ConfigDict

from configs import base

# depth, num_heads, num_kv_heads, width; head size 64 throughout
_SHAPES = {
    "125m": (30, 9, 3, 576),
    "350m": (32, 15, 5, 960),
    "600m": (40, 18, 6, 1152),
    "1b": (54, 20, 5, 1280),
    "1.5b": (54, 25, 5, 1600),
}
_MODELS = ("125m", "ls_125m", "350m", "ls_350m", "600m", "1b", "1.5b")  # as in table 9
_SHRINK = {"tiny": (10, 16), "small": (3, 4), "paper": (1, 1)}  # depth, width
PRESETS = (*_MODELS, *_SHRINK)


def get_config(preset: str = "125m") -> ConfigDict:
    """Config of a published model, or the one that all points of a study share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    if preset in ("tiny", "small"):
        base.use_small_recipe(config, preset)
        smallest = _point("125m", *_SHRINK[preset])
        base.use_base_shape(config, smallest["model.depth"], smallest["model.width"])
    else:
        base.use_paper_recipe(config)
        config.train.steps = 480_000  # paper section 2.1: 1T tokens
    if preset in _MODELS:
        base.update(config, _point(preset, 1, 1))
    return config


def study(preset: str) -> base.Study:
    names = [_name(model) for model in ([preset] if preset in _MODELS else _MODELS)]
    plain = [name for name in names if "LS" not in name]
    twice = [(name, name.replace("-LS", "")) for name in names if "LS" in name]
    return base.Study(
        question="How good are the published models, and what does applying every block twice add?",
        scientific=("model.depth", "model.width", "model.sharing"),
        labels=names,
        pairs=[*twice, *((larger, smaller) for smaller, larger in pairwise(plain))] if len(names) > 1 else (),
        matched="tokens",
        tolerance=0.0,
        **base.protocol("paper" if preset in _MODELS else preset, seeds=1 if preset in _MODELS else 3),
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    if preset in _MODELS:
        yield {}
    else:
        for model in _MODELS:
            yield _point(model, *_SHRINK[preset])


def _name(model: str) -> str:
    return f"MobileLLM-{model.upper().replace('_', '-')}"


def _point(model: str, shallower: int, thinner: int) -> base.Overrides:
    depth, heads, kv_heads, width = _SHAPES[model.removeprefix("ls_")]
    shared = model.startswith("ls_")
    return {
        "model.depth": round(depth / shallower),
        "model.num_heads": heads,
        "model.num_kv_heads": kv_heads,
        "model.width": width // thinner,
        "model.ffn_width": -(-width * 8 // (3 * 256)) * 256 // thinner,  # the paper's rule, see base.py
        "model.sharing": "immediate" if shared else "none",
        "model.num_repeats": 2 if shared else 1,
    }
