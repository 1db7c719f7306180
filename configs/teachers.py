"""Models that others learn from, see `distillation.py`.

  python -m experiments.train --config=configs/teachers.py:tiny --workdir=runs/teacher_tiny

`tiny` makes a step of `distillation:tiny` about as many times more expensive as the paper's teacher did,
2.6 to 3.2 times (table 16: 93 and 109 hours instead of 29 and 42), and sees four times the tokens of its
student.
"""

from ml_collections import ConfigDict

from configs import base

PRESETS = ("tiny",)
DEPTH, HEADS, WIDTH, FFN_WIDTH = 6, 4, 112, 336


def get_config(preset: str = "tiny") -> ConfigDict:
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    model = config.model
    model.depth, model.num_heads, model.width, model.ffn_width = DEPTH, HEADS, WIDTH, FFN_WIDTH
    model.parameterization = "completep"  # the rate of the small recipe is for the student's shape
    base.use_base_shape(config, 3, 64)
    config.train.steps *= 4
    return config
