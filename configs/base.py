"""Every default, with its reason. Other configs start from `get_config()` and change what they study.

Values marked "paper" are stated in MobileLLM (arXiv 2402.14905), those marked "official code" only in its
released training script.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import product as _product
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

Overrides = dict[str, Any]

# Arms of a study, equal at the base shape, see `use_base_shape`.
COMPLETEP: Mapping[str, Overrides] = {"completep": {"model.parameterization": "completep"}}
BOTH: Mapping[str, Overrides] = {**COMPLETEP, "standard": {"model.parameterization": "standard"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Question and protocol of a study. All fields of the config that are not named here are fixed.

    Attributes:
      question: one sentence.
      scientific: fields that the question is about; their values label the points.
      labels: names of the points, if not the values of the scientific fields.
      nuisance: the learning rate, which is tuned for each point so that it does not decide the answer.
      learning_rates: initial grid of the search, rising by one factor; see `analysis/tuning.py`. Empty: the
        rate of the config for all points.
      transferred: that rate was tuned at the base shape, and mup or completep carry it to all points.
      tuning_seeds: runs of the best rate and of its neighbours, which a single run may rank wrongly.
      matched: the budget that all points share, see `accounting.budgets`; "tokens" if the sizes differ on
        purpose, and only the number of training tokens is equal.
      latency: table of `experiments.latency` that `decode_ms` and `prefill_ms` are predicted from, a file in
        this checkout, "<file>:<type of weights>" for another type than the compute dtype.
      tolerance: largest difference in the budget of `matched`, as a fraction.
      controls: designs that lie outside the budget of `matched` on purpose.
      arms: parameterizations (name -> overrides) that every design is run under; {}: the config's alone.
      makes: the commands that make the runs its points learn or start from, by directory; these have to be
        there first.
      seeds: comparison runs of each point, in addition to its tuning runs.
      sd: expected standard deviation of the metric over seeds, for the power of the plan; None if not known.
      vary: what a seed changes: "init" (parameters), "data" (order of the rows), or both.
      metric: what is compared, lower is better: "loss" (held-out, nats per token) or, of synthetic tasks,
        "error" (share of rows that are not all right), "wrong" (of answers, as a mean over levels),
        "wrong_calls" (share of API calls that are not right),
        "log_divergence" (structure) or "forgotten" (share of bits not stored: knowledge).
      margin: the smallest difference in `metric` that matters.
      baseline: label of the point that the others are compared with; None compares all pairs.
      pairs: compares these pairs of labels only.
      x, x_label: field on the figure's x axis; None draws the points as categories.
      series, series_label: field whose values are drawn as lines over x, with "<value> <label>" as legend;
        None draws one line.
    """

    question: str
    scientific: Sequence[str]
    labels: Sequence[str] = ()
    nuisance: Sequence[str] = ("optimizer.learning_rate",)
    learning_rates: Sequence[float]
    transferred: bool = False
    tuning_seeds: int = 1
    matched: str
    latency: str = ""
    tolerance: float
    controls: Sequence[str] = ()
    arms: Mapping[str, Overrides] = dataclasses.field(default_factory=dict)
    makes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: int
    sd: float | None = None
    vary: Sequence[str] = ("init", "data")
    metric: str = "loss"
    margin: float
    baseline: str | None = None
    pairs: Sequence[tuple[str, str]] = ()
    x: str | None = None
    x_label: str = ""
    series: str | None = None
    series_label: str = ""


def get_config(preset: str = "") -> ConfigDict:
    """Config of a small model on the bundled text, without presets."""
    check_preset(__file__, preset, ("",))
    config = ConfigDict()

    model = config.model = ConfigDict()
    model.vocab_size = 2048  # fits the default tokenizer
    model.depth = 4
    model.width = 128
    model.num_heads = 4
    model.num_kv_heads = placeholder(int)  # None: num_heads, plain multi-head attention
    model.head_dim = placeholder(int)  # None: width / num_heads
    model.ffn_kind = "swiglu"  # paper section 2.2.1
    model.ffn_width = placeholder(int)  # None: 8/3 width up to a multiple of 256; 4 width for relu and gelu
    model.share_embedding = True  # paper section 2.2.3
    model.sharing = "none"  # none | immediate | repeat_all | reverse | an explicit plan "0 1 2 1 2 3"
    model.num_repeats = 1
    model.loop_gains = False  # uses of a block are all alike, as in the paper; see model/uses.py
    model.loop_rank = 0
    model.loop_targets = "attention|ffn"  # all matrices of the blocks
    model.loop_scale = ""  # '' | learned | "1 0.5": a factor for each use
    model.loop_embedding = False
    model.loop_norm = False
    model.rope_base = 10_000.0  # official code
    model.norm_epsilon = 1e-5  # official code
    model.init_std = 0.02  # official code: every matrix, no scaling with depth
    model.parameterization = "standard"  # standard (the paper's) | mup | completep
    model.base_width = 128  # where mup and completep equal standard: this config's shape
    model.base_depth = 4
    model.compute_dtype = "float32"  # float32 | bfloat16 | auto: bfloat16 where it is fast
    model.attention = "auto"  # auto | chunks | cudnn | splash: the kernel in training, by the devices
    # none | dots | full: ever less memory; dots is the fastest on CPUs, and of the loops over layers on a GPU
    model.remat = "dots"
    model.scan_unroll = 1
    model.loss_chunk = 256  # positions; divides the memory of the logits by sequence_length / loss_chunk

    data = config.data = ConfigDict()
    data.source = "bundled"  # real English that ships with Python, another text in every version: no download
    data.valid_source = ""  # hold out documents of `source`, or the end of it where it is a single text file
    data.valid_fraction = 0.1
    data.text_field = "text"
    data.tokenizer = "bpe:2048"
    data.sequence_length = 256  # documents share a row, and attention crosses their borders: there is no mask
    data.cache_dir = "~/.cache/mobilellm_jax"

    optimizer = config.optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | muon
    optimizer.learning_rate = 2e-3  # paper section 3.1
    optimizer.schedule = "cosine"  # paper section 3.1; cosine | linear | wsd | constant
    optimizer.warmup_steps = 50
    optimizer.final_fraction = 0.1  # official code
    optimizer.decay_fraction = 0.2  # of the steps, used by "wsd" only
    optimizer.beta1 = 0.9  # official code
    optimizer.beta2 = 0.95  # official code
    optimizer.epsilon = 1e-8  # official code
    optimizer.momentum = 0.95  # used by "muon" only
    optimizer.weight_decay = 0.1  # paper section 3.1
    optimizer.clip_norm = 1.0  # official code

    train = config.train = ConfigDict()
    train.init_from = ""  # random parameters
    train.resume_optimizer = False  # its moments and their decay belong to another text and rate
    train.grow = ""  # '' | unroll | "0 1 0 1": a model with other blocks is a mistake more often than a wish
    train.resize_embedding = False  # another vocabulary is a mistake more often than a wish
    train.lora_rank = 0  # train all parameters
    train.lora_targets = "attention|ffn"  # all matrices of the blocks
    train.lora_alpha = 16.0  # a scale of 2 at rank 8
    train.teacher = ""  # none
    train.teacher_weight = 0.5  # the paper does not state it
    train.teacher_temperature = 1.0  # paper: the cross-entropy with the teacher's output, as it is
    train.quantize = ""  # full precision; w4:32 and the like: rounded in every forward pass
    train.steps = 500
    train.batch_size = 16
    train.accumulation_steps = 1
    train.loops = ""  # num_repeats in every step; "1..4": drawn anew for each
    train.init_seed = 0
    train.data_seed = 0
    train.eval_every = 100
    train.eval_rows = 0  # all held-out rows
    train.eval_split = "valid"  # valid | tuning: other documents, on which learning rates are chosen
    train.eval_batch_size = 16
    train.checkpoint_every = 200
    train.log_every = 20
    train.writers = "tensorboard"  # needs no account; wandb and trackio are extras

    mesh = config.mesh = ConfigDict()
    mesh.data = -1  # all devices: plain data parallelism
    mesh.fsdp = 1
    mesh.tensor = 1

    config.lock()
    return config


def check_preset(file: str, preset: str, presets: Sequence[str]) -> None:
    """Raises ValueError, naming the presets there are, if `preset` is not one of them."""
    if preset not in presets:
        valid = ", ".join(presets) if any(presets) else "none, leave out the colon"
        raise ValueError(f"{Path(file).name} has no preset {preset!r}; valid presets: {valid}")


def presets_of(collections: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The presets of a file with collections of studies: these, then every study."""
    return (*collections, *dict.fromkeys(study for of in collections.values() for study in of))


def members(file: str, collections: Mapping[str, Sequence[str]], preset: str) -> list[str]:
    """The studies of a collection as values of --config; none where the preset is a study itself."""
    return [f"configs/{Path(file).name}:{study}" for study in collections.get(preset, ())]


def use_recipe(config: ConfigDict, preset: str) -> None:
    """Sets the recipe of a preset: that of the paper for `paper*`, else the small one."""
    if preset.startswith("paper"):
        use_paper_recipe(config)
    else:
        use_small_recipe(config, preset)


def protocol(preset: str, seeds: int | None = None) -> dict[str, Any]:
    """Fields of a `Study` that depend on the cost of a run.

    `paper*` has the paper's parameterization, and one learning rate for all shapes, as in the paper; its
    three seeds are ours, the paper has one. `seeds` replaces the number of seeds.
    """
    paper, tiny = preset.startswith("paper"), preset == "tiny"
    return {
        "arms": {} if paper else BOTH,
        "learning_rates": () if paper else (2**-8, 2**-7, 2**-6),
        "seeds": seeds or (5 if tiny else 3),
        "margin": 0.05 if tiny else 0.02,
        "sd": 0.025 if tiny else None,  # of `noise:tiny`
    }


def use_base_shape(config: ConfigDict, depth: int, width: int) -> None:
    """Sets the shape where completep equals standard, and an initialisation of 1 / sqrt(width) there.

    The paper's 0.02 is 0.4 to 0.7 / sqrt(width) at its widths, but 0.1 / sqrt(width) at ours, where the
    branches of deep stacks would learn next to nothing at first.
    """
    config.model.base_depth, config.model.base_width = depth, width
    config.model.init_std = width**-0.5


def use_paper_recipe(config: ConfigDict) -> None:
    """Sets the vocabulary, batch and schedule of MobileLLM's ablations, for accelerators."""
    config.model.vocab_size = 32_000  # paper section 2.2.3
    config.model.compute_dtype = "bfloat16"  # official code
    config.data.sequence_length = 2048  # inferred: 0.25T tokens / 120k steps / 1,024 sequences
    config.data.tokenizer = "bpe:32000"  # the paper's: the LLaMA SentencePiece model, sentencepiece:<file>
    config.optimizer.learning_rate = 2e-3  # paper section 3.1
    config.optimizer.warmup_steps = 1000  # official code
    config.train.steps = 120_000  # paper section 2.1: 0.25T tokens
    config.train.batch_size = 1024  # paper section 3.1: 32 GPUs x 32 sequences
    config.train.eval_every = 2000
    config.train.eval_batch_size = 1024
    config.train.checkpoint_every = 1000
    config.train.log_every = 50


def use_small_recipe(config: ConfigDict, preset: str) -> None:
    """Sets vocabulary, batch and schedule for studies at `tiny` (2 CPU cores) and `small` (a GPU) scale."""
    tiny = preset == "tiny"
    config.model.vocab_size = 512 if tiny else 4096
    config.data.tokenizer = f"bpe:{config.model.vocab_size}"
    config.data.sequence_length = 64 if tiny else 512
    config.optimizer.learning_rate = 5e-3 if tiny else 3e-3
    config.optimizer.warmup_steps = 120 if tiny else 200
    config.train.steps = 350 if tiny else 4000
    config.train.batch_size = 8 if tiny else 32
    config.train.eval_every = 70 if tiny else 500
    config.train.eval_rows = 192 if tiny else 1024
    config.train.eval_batch_size = 64 if tiny else 32
    config.train.checkpoint_every = 350 if tiny else 500
    config.train.log_every = 175 if tiny else 100


def product(**fields: Sequence[Any]) -> Iterator[Overrides]:
    """Yields every combination of values. `__` in a name stands for a dot: model__depth=(2, 4)."""
    for values in _product(*fields.values()):
        yield _dotted(zip(fields, values, strict=True))


def zipped(**fields: Sequence[Any]) -> Iterator[Overrides]:
    """Yields the first values together, then the second values, and so on."""
    for values in zip(*fields.values(), strict=True):
        yield _dotted(zip(fields, values, strict=True))


def _dotted(pairs: Any) -> Overrides:
    return {name.replace("__", "."): value for name, value in pairs}


def update(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Sets dotted fields in place, and returns the config."""
    config.update_from_flattened_dict(overrides)
    return config
