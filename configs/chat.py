"""Table 5 of the paper, chat: what does a base model bring to replies, and what do adapters and sharing cost?

  python -m experiments.train --config=configs/teachers.py:chat --workdir=runs/chat_base
  python -m experiments.train --config=configs/teachers.py:chat_twice --workdir=runs/chat_base_twice
  python -m experiments.sweep --config=configs/chat.py:tiny --instructions=all

`tiny` fine-tunes on generated conversations with a telephone, as many steps from each start: random weights;
a base model, trained on the bundled English by the first command, with all parameters or with adapters of
rank 8; and a base model that applies its blocks twice, from the second command. The last is the paper's own
comparison, MobileLLM-LS against MobileLLM. Compared is the held-out loss on replies; with --instructions, the
report has rules that a program can check, words, empty and repeating replies beside it.

`paper_125m` and `paper_350m` fine-tune MobileLLM and MobileLLM-LS on conversations of the user,
chat/train*.jsonl and chat/valid*.jsonl. The paper names neither its conversations nor the recipe of this
table, so the recipe is that of table 6.

What it cannot show: how good a conversation is. The paper's scores are GPT-4's verdicts; the files that its
judges read are written by `experiments.chat --questions --answers`. There is one base model of each kind, so
the seeds say how sure the fine-tuning is, and not how sure a base model is.
"""

from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from configs import base, mobilellm, teachers

_BASE, _TWICE = "runs/chat_base", "runs/chat_base_twice"
_MAKE = "python -m experiments.train --config=configs/"
_TINY: Mapping[str, base.Overrides] = {
    "random weights": {},
    "base": {"train.init_from": _BASE},
    "base, adapters": {"train.init_from": _BASE, "train.lora_rank": 8},
    "base, blocks twice": {"train.init_from": _TWICE, "model.sharing": "immediate", "model.num_repeats": 2},
}
_FIELDS: base.Overrides = {
    "train.init_from": "",
    "train.lora_rank": 0,
    "model.sharing": "none",
    "model.num_repeats": 1,
}
PRESETS = ("tiny", "paper_125m", "paper_350m")


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    if preset != "tiny":
        return _paper_config(preset)
    config = teachers.get_config("chat")
    config.data.source = "api_calls:tasks=1"
    config.data.valid_source = "api_calls:split=combinations,tasks=1"
    config.data.tokenizer = f"huggingface:{_BASE}/tokenizer/tokenizer.json"
    config.data.sequence_length = 192  # one conversation, in the vocabulary of the base model
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_steps = 10
    train = config.train
    train.steps = train.log_every = train.checkpoint_every = 100
    train.eval_every = 50
    train.eval_rows = train.eval_batch_size = 256
    return config


def _paper_config(preset: str) -> ConfigDict:
    config = mobilellm.get_config(preset.removeprefix("paper_"))
    config.data.source = "conversations:chat/train*.jsonl"
    config.data.valid_source = "conversations:chat/valid*.jsonl"
    config.data.tokenizer = f"huggingface:{_parents(preset)[0]}/tokenizer/tokenizer.json"
    config.optimizer.learning_rate = 2e-5  # paper section 3.3, of API calls
    config.optimizer.schedule = "linear"  # as above
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.01  # paper section 3.3
    config.train.batch_size = config.train.eval_batch_size = 32
    config.train.steps = 1000
    config.train.eval_every = config.train.checkpoint_every = 250
    config.train.log_every = 10
    return config


def _parents(preset: str) -> tuple[str, str]:
    size = preset.removeprefix("paper_")
    return f"runs/mobilellm_{size}", f"runs/mobilellm_ls_{size}"


def study(preset: str) -> base.Study:
    labels = list(_rows(preset))
    tiny = preset == "tiny"
    return base.Study(
        question="What does a base model bring to replies, and what do adapters and sharing cost?",
        scientific=("train.init_from", "train.lora_rank", "model.sharing", "model.num_repeats"),
        labels=labels,
        pairs=[(labels[1], labels[0]), *((label, labels[1]) for label in labels[2:])],
        learning_rates=(2**-8, 2**-7) if tiny else (),
        matched="total_parameters",
        tolerance=0.0,
        makes=_makes(preset),
        seeds=3 if tiny else 1,
        vary=("init", "data"),
        margin=0.01,
    )


def _makes(preset: str) -> dict[str, str]:
    if preset == "tiny":
        specs = {_BASE: "teachers.py:chat", _TWICE: "teachers.py:chat_twice"}
    else:
        size = preset.removeprefix("paper_")
        specs = dict(zip(_parents(preset), (f"mobilellm.py:{size}", f"mobilellm.py:ls_{size}"), strict=True))
    return {run: f"{_MAKE}{spec} --workdir={run}" for run, spec in specs.items()}


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    yield from ({**_FIELDS, **row} for row in _rows(preset).values())


def _rows(preset: str) -> Mapping[str, base.Overrides]:
    if preset == "tiny":
        return _TINY
    once, twice = _parents(preset)
    return {
        f"MobileLLM-{preset.removeprefix('paper_').upper()}": {"train.init_from": once},
        f"MobileLLM-LS-{preset.removeprefix('paper_').upper()}": {
            "train.init_from": twice,
            "model.sharing": "immediate",
            "model.num_repeats": 2,
        },
    }
