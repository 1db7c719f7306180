"""The published models (MobileLLM table 9; LS: table 10), with the recipe of their pretraining.

`python -m experiments.train --config=configs/mobilellm.py:125m --workdir=runs/125m
 --config.data.source=files:'corpus/*.jsonl.zst' --config.data.tokenizer=sentencepiece:tokenizer.model`

The paper trained on 32 A100 for 3 (125m) to 18 (1.5b) days. `ls_*` apply every block twice in a row.
"""

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
PRESETS = (*_SHAPES, "ls_125m", "ls_350m")


def get_config(preset: str = "125m") -> ConfigDict:
    """Returns one of the published models."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_paper_recipe(config)
    config.train.steps = 480_000  # paper section 2.1: 1T tokens
    model = config.model
    model.depth, model.num_heads, model.num_kv_heads, model.width = _SHAPES[preset.removeprefix("ls_")]
    if preset.startswith("ls_"):
        model.sharing, model.num_repeats = "immediate", 2
    return config
