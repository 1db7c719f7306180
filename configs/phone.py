"""From a text to a model that calls APIs, in two runs: docs/tutorials/phone.md.

  python -m experiments.train --config=configs/phone.py:text --workdir=runs/text \
 --config.data.source=files:novels_train.jsonl.xz
  python -m experiments.train --config=configs/phone.py:calls --workdir=runs/phone

`text` trains a base model of 160 thousand parameters on any text; `calls` goes on from it, in runs/text, on
generated conversations of one task with the first four intents, whose values are words to copy. The shape
suits llama.cpp: rows of a multiple of 32, as its 8 and 4 bits need.
"""

from ml_collections import ConfigDict

from configs import base

PRESETS = ("text", "calls")
_BASE = "runs/text"


def get_config(preset: str = "text") -> ConfigDict:
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    model, data, optimizer, train = config.model, config.data, config.optimizer, config.train
    model.vocab_size = 1024
    model.depth, model.num_heads, model.width, model.ffn_width = 2, 4, 64, 160
    base.use_base_shape(config, model.depth, model.width)
    data.tokenizer = f"bpe:{model.vocab_size}"
    data.sequence_length = 128  # one conversation
    optimizer.learning_rate = 2**-6
    optimizer.schedule = "linear"
    optimizer.final_fraction = 0.0
    train.steps, train.log_every, train.checkpoint_every = 300, 100, 100
    train.eval_every, train.eval_rows, train.eval_batch_size = 300, 256, 64
    if preset == "calls":
        train.init_from = _BASE
        data.source = "api_calls:tasks=1,intents=4"
        data.valid_source = "api_calls:split=combinations,tasks=1,intents=4"
        data.tokenizer = f"huggingface:{_BASE}/tokenizer/tokenizer.json"
        train.steps, train.eval_every = 400, 200
    return config
