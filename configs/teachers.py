"""Models that others learn from, see `distillation.py`, or start from, see `chat.py`.

  python -m experiments.train --config=configs/teachers.py:tiny --workdir=runs/teacher_tiny
  python -m experiments.train --config=configs/teachers.py:chat --workdir=runs/chat_base

`tiny` makes a step of `distillation:tiny` about as many times more expensive as the paper's teacher did,
2.6 to 3.2 times (table 16: 93 and 109 hours instead of 29 and 42), and sees four times the tokens of its
student. `chat` and `chat_twice`, which applies its blocks twice, are the base models of `chat:tiny`: they see
the bundled English about once.
"""

from ml_collections import ConfigDict

from configs import base

PRESETS = ("tiny", "chat", "chat_twice")
DEPTH, HEADS, WIDTH, FFN_WIDTH = 6, 4, 112, 336


def get_config(preset: str = "tiny") -> ConfigDict:
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, "tiny")
    if preset != "tiny":
        _use_base_of_chat(config, twice=preset == "chat_twice")
        return config
    model = config.model
    model.depth, model.num_heads, model.width, model.ffn_width = DEPTH, HEADS, WIDTH, FFN_WIDTH
    model.parameterization = "completep"  # the rate of the small recipe is for the student's shape
    base.use_base_shape(config, 3, 64)
    config.train.steps *= 4
    return config


def _use_base_of_chat(config: ConfigDict, twice: bool) -> None:
    model, train = config.model, config.train
    model.depth, model.num_heads, model.width, model.ffn_width = 3, 4, 64, 192
    base.use_base_shape(config, model.depth, model.width)
    if twice:
        model.sharing, model.num_repeats = "immediate", 2
    config.data.sequence_length = 128
    train.batch_size = 16
    train.steps = train.checkpoint_every = 500
    train.eval_every = train.log_every = 250
