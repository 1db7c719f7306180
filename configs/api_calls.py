"""Table 6 of the paper, API calls: does depth, or a second use of blocks, pay in copying values into calls?

  python -m experiments.sweep --config=configs/api_calls.py:tiny
  python -m experiments.train --config=configs/api_calls.py:paper_125m --workdir=runs/phone_125m

`tiny` trains from random weights on generated conversations of one task with the first four intents, whose
slots are words to copy: one wide block, two, and a deeper, thinner stack of equal size; the two blocks
applied twice; and, outside of the equal size on purpose, four blocks and the two trained for as many FLOPs.
Compared is the share of held-out calls that greedy decoding gets wholly right, after true conversations; no
call that is asked was in training. Which intent is asked for, and the names of its slots, are learned long
before the values.

`paper_125m` and `paper_350m` have the paper's shapes and its recipe for this table: 5,000 conversations, four
epochs, 2e-5 falling to 0, weight decay 0.01; batch and length of rows are not stated. The paper begins with
pretrained weights, these presets with random ones unless they are given others.

What it cannot show: the paper's numbers, as its conversations and what it calls "structure" were not
published; and how well people's wishes are understood, as the sentences come from a few dozen patterns.
`experiments.evaluate --calls=combinations,values,wordings` asks a trained run for what else is new.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

Shape = tuple[int, int, int, int]  # depth, num_heads, width, ffn_width; heads have size 16

# 33,000 non-embedding parameters each
_SHAPES: tuple[Shape, ...] = ((1, 3, 52, 146), (2, 2, 38, 100), (4, 2, 26, 62))
_ORDERS = ("immediate", "repeat_all")
# Of training with two blocks applied twice, over those of once; the head is a large part of both.
_FLOPS = 1.667
_STEPS = 200
_PAPER = {"paper_125m": (30, 9, 3, 576), "paper_350m": (32, 15, 5, 960)}  # depth, heads, kv heads, width
PRESETS = ("tiny", *_PAPER)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    if preset == "tiny":
        _use_tiny_recipe(config)
    else:
        _use_paper_recipe(config, preset)
    return config


def _use_tiny_recipe(config: ConfigDict) -> None:
    depth, _, width, _ = _SHAPES[1]
    base.update(config, _row(_SHAPES[1]))
    base.use_base_shape(config, depth, width)
    config.model.vocab_size = 512
    config.model.head_dim = 16
    config.data.source = "api_calls:tasks=1,intents=4"
    config.data.valid_source = "api_calls:split=combinations,tasks=1,intents=4"
    config.data.tokenizer = "bpe:512"
    config.data.sequence_length = 103  # one conversation
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.learning_rate = 2**-5
    config.optimizer.warmup_steps = _STEPS // 10
    train = config.train
    train.steps = train.log_every = train.checkpoint_every = _STEPS
    train.batch_size = 16
    train.eval_every = _STEPS // 2
    train.eval_rows = train.eval_batch_size = 256


def _use_paper_recipe(config: ConfigDict, preset: str) -> None:
    depth, heads, kv_heads, width = _PAPER[preset]
    base.use_paper_recipe(config)
    config.model.depth, config.model.width = depth, width
    config.model.num_heads, config.model.num_kv_heads = heads, kv_heads
    config.data.source = "api_calls:"
    config.data.valid_source = "api_calls:split=combinations"
    config.data.sequence_length = 512  # three conversations in the vocabulary of LLaMA
    config.optimizer.learning_rate = 2e-5  # paper section 3.3
    config.optimizer.schedule = "linear"  # paper section 3.3
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.01  # paper section 3.3
    train = config.train
    train.batch_size = 32
    train.steps = 260  # four epochs of 2,070 rows, paper section 3.3
    train.eval_every = train.checkpoint_every = 65
    train.log_every = 10
    train.eval_rows = 256
    train.eval_batch_size = 32


def study(preset: str) -> base.Study:
    if preset in _PAPER:
        return _one_model(preset)
    shapes = [_label(shape) for shape in _SHAPES]
    once = shapes[1]
    twice, long = _label(_SHAPES[1], 2), f"{once}, equal FLOPs"
    pairs = [(label, once) for label in shapes if label != once]
    for order in _ORDERS:
        pairs += [(f"{once} {order}", other) for other in (once, twice, long)]
    return base.Study(
        question="Does depth, or a second use of blocks, pay in copying values into calls?",
        scientific=("model.depth", "model.width", "model.sharing", "train.steps"),
        labels=[label for label, _ in _rows()],
        pairs=pairs,
        arms=base.COMPLETEP,
        learning_rates=(2**-6, 2**-5, 2**-4),
        matched="non_embedding_parameters",
        tolerance=0.02,
        controls=[twice, long],
        seeds=4,
        metric="wrong_calls",
        margin=0.05,
    )


def _one_model(preset: str) -> base.Study:
    return base.Study(
        question="How many whole calls does a model of the paper's shape get right?",
        scientific=("model.depth", "model.width"),
        labels=[f"MobileLLM-{preset.removeprefix('paper_').upper()}"],
        learning_rates=(),
        matched="tokens",
        tolerance=0.0,
        seeds=1,
        metric="wrong_calls",
        margin=0.02,
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    if preset in _PAPER:
        yield {}
    else:
        yield from (row for _, row in _rows())


def _rows() -> Iterator[tuple[str, base.Overrides]]:
    for shape in _SHAPES:
        yield _label(shape), _row(shape)
    shape = _SHAPES[1]
    once = _row(shape)
    for order in _ORDERS:
        yield f"{_label(shape)} {order}", {**once, "model.sharing": order, "model.num_repeats": 2}
    yield _label(shape, 2), {**once, "model.depth": 2 * shape[0]}
    yield f"{_label(shape)}, equal FLOPs", {**once, "train.steps": round(_STEPS * _FLOPS)}


def _row(shape: Shape) -> base.Overrides:
    names = ("model.depth", "model.num_heads", "model.width", "model.ffn_width")
    return {
        **dict(zip(names, shape, strict=True)),
        "model.sharing": "none",
        "model.num_repeats": 1,
        "train.steps": _STEPS,
    }


def _label(shape: Shape, times: int = 1) -> str:
    return f"{times * shape[0]} x {shape[2]}"
