"""What a run is: frozen, validated dataclasses. `from_config_dict` is the one door into them.

There are no defaults here: every default value stands in `configs/base.py`, with the reason for it.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mobilellm_jax import validation as rules
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.sharing import LayerPlan, layer_plan

FFN_KINDS = ("swiglu", "relu", "gelu")
REMAT_POLICIES = ("none", "dots", "full")
PARAMETERIZATIONS = ("standard", "mup", "completep")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "constant")
TASKS = ("khop", "addition", "recall")  # synthetic, see `data/tasks.py`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the transformer. Hashable: a static argument of jitted functions.

    Attributes:
      vocab_size: V, rows of the embedding; at least the tokenizer's vocabulary.
      depth: U, number of distinct blocks (the paper's "#layers").
      width: D, size of the residual stream.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; each serves N / K query heads (grouped-query attention).
      head_dim: H, size of one head; even, because RoPE rotates pairs.
      ffn_kind: "swiglu" (three matrices), "relu" or "gelu" (two matrices).
      ffn_width: F, hidden size of the feed-forward layer.
      share_embedding: the output head uses the embedding matrix (section 2.2.3).
      sharing: layer sharing strategy or explicit plan, see `sharing.layer_plan`.
      num_repeats: times each block is applied under a sharing strategy.
      rope_base: base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      init_std: standard deviation of every matrix at initialisation.
      parameterization: "standard" (the paper's), "mup" or "completep", see `parameterization.py`.
      base_width, base_depth: the shape at which "mup" and "completep" equal "standard".
      compute_dtype: "float32" or "bfloat16", the dtype of matrix products; parameters stay float32, and
        norms, softmax, logits and loss are computed in float32. On GPU and TPU, float32 products are rounded
        (TF32, bfloat16 passes) unless JAX's `jax_default_matmul_precision` says otherwise.
      remat: what the backward pass recomputes: "none", all but matrix products ("dots"), or "full".
      scan_unroll: layers per iteration of the compiled loop over the plan; above 1, the backward pass holds
        more than one layer's weights and, whatever `remat` says, activations; as many as layers: no loop.
      loss_chunk: sequence positions whose logits exist at one time in the loss; best a divisor of the
        sequence length, which is padded to a multiple of it.
    """

    vocab_size: int
    depth: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_kind: str
    ffn_width: int
    share_embedding: bool
    sharing: str
    num_repeats: int
    rope_base: float
    norm_epsilon: float
    init_std: float
    parameterization: str
    base_width: int
    base_depth: int
    compute_dtype: str
    remat: str
    scan_unroll: int
    loss_chunk: int

    def __post_init__(self) -> None:
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        rules.check_all(
            "model",
            self,
            {
                **dict.fromkeys(sizes, rules.POSITIVE_INT),
                **dict.fromkeys(["rope_base", "norm_epsilon", "init_std"], rules.POSITIVE),
                "ffn_kind": rules.one_of(FFN_KINDS),
                "parameterization": rules.one_of(PARAMETERIZATIONS),
                "compute_dtype": rules.one_of(("float32", "bfloat16")),
                "remat": rules.one_of(REMAT_POLICIES),
            },
        )
        if self.num_heads % self.num_kv_heads:
            small = [k for k in range(1, math.isqrt(self.num_heads) + 1) if self.num_heads % k == 0]
            divisors = sorted({*small, *(self.num_heads // k for k in small)})
            raise UserError(
                f"model.num_kv_heads: {self.num_kv_heads} does not divide model.num_heads={self.num_heads}; "
                f"valid: {', '.join(map(str, divisors))}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim: {self.head_dim} is odd; RoPE needs an even head size")
        layer_plan(self.sharing, self.depth, self.num_repeats)  # raises if the plan is not valid

    @property
    def plan(self) -> LayerPlan:
        """Block index of every layer applied, in order."""
        return layer_plan(self.sharing, self.depth, self.num_repeats)

    @property
    def effective_depth(self) -> int:
        """L, the number of layers applied."""
        return len(self.plan)


_SOURCES = {"bundled": "text", "files": "text", "tfds": "text", "tokens": "token ids"} | {t: t for t in TASKS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes rows of token ids. See `data/`.

    Attributes:
      source: "bundled", "files:<glob>", "tokens:<glob>" (jsonl of {"token_ids": [...]}), "tfds:<name>", or a
        synthetic task, "khop:...", "addition:..." or "recall:..." with its numbers (`data/tasks.py`).
      valid_source: a source of other text, used whole as the held-out split; "" splits `source` by document,
        or a single text file near its end; of a task, the same task with other numbers; "" draws other rows.
      valid_fraction: share of documents, or of the single text, held out when `valid_source` is "".
      text_field: field that holds the text in jsonl files and TFDS examples.
      tokenizer: "bytes", "bpe:<vocabulary size>" (trained on `source` at first use),
        "sentencepiece:<file.model>" or "huggingface:<tokenizer.json>"; ignored by "tokens:" sources.
      sequence_length: T, tokens a row predicts; attention crosses the borders of documents in a row.
      cache_dir: where prepared rows are kept; "~" is expanded.
    """

    source: str
    valid_source: str
    valid_fraction: float
    text_field: str
    tokenizer: str
    sequence_length: int
    cache_dir: str

    def __post_init__(self) -> None:
        rules.check_all(
            "data",
            self,
            {
                "sequence_length": rules.POSITIVE_INT,
                "text_field": (bool, "the name of a field"),
                "cache_dir": (bool, "a directory"),
                "tokenizer": (
                    lambda v: v == "bytes" or v.startswith(("bpe:", "sentencepiece:", "huggingface:")),
                    "'bytes', 'bpe:<vocabulary size>', 'sentencepiece:<file>' or 'huggingface:<file>'",
                ),
            },
        )
        kinds = [v.partition(":")[0] for v in (self.source, self.valid_source)]
        valid = "'bundled' or one of " + ", ".join(f"'{kind}:...'" for kind in list(_SOURCES)[1:])
        for name, kind in zip(("source", "valid_source"), kinds, strict=True):
            value = getattr(self, name)
            ok = kind in _SOURCES and (kind == value) == (kind == "bundled")
            rules.check(ok or (name == "valid_source" and not value), f"data.{name}", value, valid)
        if self.valid_source:
            wanted, there = (_SOURCES[kind] for kind in kinds)
            rules.check(
                wanted == there, "data.valid_source", self.valid_source, f"{wanted}, like data.source"
            )
        else:
            rules.check(
                0 < self.valid_fraction < 1, "data.valid_fraction", self.valid_fraction, "between 0 and 1"
            )

    @property
    def is_task(self) -> bool:
        """Whether rows come from a synthetic task, which has right answers but no text."""
        return self.source.partition(":")[0] in TASKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule. See `training/optimizer.py`.

    Attributes:
      name: "adamw", or "muon" for the matrices of the blocks (and Adam for the rest).
      learning_rate: peak learning rate.
      schedule: "cosine", "wsd" (warm-up, stable, linear decay) or "constant" (after warm-up).
      warmup_steps: steps of linear warm-up from 0.
      final_fraction: where the schedule ends, one step after the last, as a fraction of the peak.
      decay_fraction: share of the steps that "wsd" spends decaying.
      beta1, beta2, epsilon: Adam's constants.
      momentum: Muon's.
      weight_decay: decoupled decay, on matrices only (embeddings included, norm gains not).
      clip_norm: largest global norm of the gradient; larger gradients are scaled down to it.
    """

    name: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    final_fraction: float
    decay_fraction: float
    beta1: float
    beta2: float
    epsilon: float
    momentum: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        rules.check_all(
            "optimizer",
            self,
            {
                **dict.fromkeys(["learning_rate", "epsilon", "clip_norm"], rules.POSITIVE),
                **dict.fromkeys(["final_fraction", "decay_fraction"], rules.FRACTION),
                **dict.fromkeys(["beta1", "beta2", "momentum"], rules.BELOW_ONE),
                "name": rules.one_of(OPTIMIZERS),
                "schedule": rules.one_of(SCHEDULES),
                "warmup_steps": rules.COUNT,
                "weight_decay": rules.NOT_NEGATIVE,
            },
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, seeds and cadence of a run. See `training/loop.py`.

    Attributes:
      steps: optimizer steps.
      batch_size: B, sequences in one optimizer step, over all devices and accumulation steps.
      accumulation_steps: parts that a batch is cut into, one after the other, to save memory.
      init_seed: seed of the initial parameters.
      data_seed: seed of the order of the training rows.
      eval_every: steps between evaluations on the held-out split; there is always one after the last step.
      eval_rows: held-out rows used, in a fixed order; 0 uses all of them.
      eval_batch_size: rows in one evaluation batch.
      checkpoint_every: steps between checkpoints; there is always one after the last step.
      log_every: steps between progress lines.
    """

    steps: int
    batch_size: int
    accumulation_steps: int
    init_seed: int
    data_seed: int
    eval_every: int
    eval_rows: int
    eval_batch_size: int
    checkpoint_every: int
    log_every: int

    def __post_init__(self) -> None:
        positive = "steps batch_size accumulation_steps eval_every eval_batch_size checkpoint_every log_every"
        rules.check_all(
            "train",
            self,
            {
                **dict.fromkeys(positive.split(), rules.POSITIVE_INT),
                **dict.fromkeys(
                    ["init_seed", "data_seed"], (lambda v: 0 <= v < 2**32, "an integer from 0 to 2**32 - 1")
                ),
                "eval_rows": rules.COUNT,
            },
        )
        if self.batch_size % self.accumulation_steps:
            raise UserError(
                f"train.accumulation_steps: {self.accumulation_steps} does not divide "
                f"train.batch_size={self.batch_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh axes; one may be -1, "all remaining devices". See `parallel/partition.py`.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: ways in which parameters and optimizer state are split, along with the batch.
      tensor: ways in which heads, feed-forward width and vocabulary are split.
    """

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
            rules.check(size == -1 or size >= 1, f"mesh.{name}", size, "an integer of at least 1, or -1")
        rules.check(sizes.count(-1) <= 1, "mesh", sizes, "at most one axis of size -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        # An unfinished warm-up never reaches the learning rate that the record reports.
        rules.check(warmup <= steps, "optimizer.warmup_steps", warmup, f"at most train.steps={steps}")
        if self.data.is_task:
            rules.check(self.train.eval_rows > 0, "train.eval_rows", 0, "at least 1: a task has no last row")
        if self.optimizer.name == "muon":  # the table of multipliers is for Adam
            standard = self.model.parameterization == "standard"
            rules.check(
                standard, "model.parameterization", self.model.parameterization, "'standard' with muon"
            )


def from_config_dict(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates a `Config` from a `ConfigDict` or nested mappings, such as parsed JSON.

    Fields of `model` that are None are derived: `num_kv_heads` = `num_heads`, `head_dim` = `width` /
    `num_heads`, `ffn_width` by the paper's rule, see `default_ffn_width`.

    Raises:
      UserError: a field is unknown, missing, of the wrong type or out of range; the message names it.
    """
    return _build(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Returns nested plain dictionaries, ready for JSON; `from_config_dict` takes them back."""
    return dataclasses.asdict(config)


def default_ffn_width(ffn_kind: str, width: int) -> int:
    """Returns 4 D for two-matrix kinds; for SwiGLU 8/3 D rounded up to a multiple of 256.

    The SwiGLU rule gives every feed-forward width that the paper prints (`param_check` in the tests).
    """
    return 256 * math.ceil(8 * width / (3 * 256)) if ffn_kind == "swiglu" else 4 * width


def _derive_model_fields(fields: dict[str, Any]) -> None:
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["ffn_width"] is None:
        fields["ffn_width"] = default_ffn_width(fields["ffn_kind"], fields["width"])
    if fields["head_dim"] is None:
        width, heads = fields["width"], fields["num_heads"]
        rules.check(heads >= 1, "model.num_heads", heads, "an integer of at least 1")
        if width % (2 * heads):
            odd = "leaves an odd head size, which RoPE cannot rotate, with"
            why = "is not divisible by" if width % heads else odd
            nearest = 2 * heads * max(1, round(width / (2 * heads)))
            raise UserError(
                f"model.width: {width} {why} model.num_heads={heads}; the nearest width that fits: {nearest} "
                "(or set model.head_dim)"
            )
        fields["head_dim"] = width // heads


_DERIVED = ("num_kv_heads", "head_dim", "ffn_width")


def _build(cls: type, values: Any, path: str) -> Any:
    """Returns `cls(**values)` after checking names and types, descending into nested dataclasses."""
    if not isinstance(values, Mapping):
        try:
            values = dict(values.items())  # ConfigDict is not a Mapping
        except AttributeError:
            raise UserError(f"{path or 'config'}: {values!r} is not a group of fields") from None
    types_of = typing.get_type_hints(cls)
    dot = f"{path}." if path else ""
    for name in values:
        if name not in types_of:
            raise UserError(f"{dot}{name}: no such field; {did_you_mean(str(name), types_of)}")
    fields = {}
    for name, wanted in types_of.items():
        if name not in values:
            raise UserError(f"{dot}{name}: the field is missing")
        value = values[name]
        if dataclasses.is_dataclass(wanted):
            assert isinstance(wanted, type)
            fields[name] = _build(wanted, value, f"{dot}{name}")
        elif value is None and cls is ModelConfig and name in _DERIVED:
            fields[name] = None
        else:
            fields[name] = _coerce(value, wanted, f"{dot}{name}")
    if cls is ModelConfig:
        _derive_model_fields(fields)
    return cls(**fields)


def _coerce(value: Any, wanted: type | types.UnionType, field: str) -> Any:
    if wanted is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not wanted:
        name = getattr(wanted, "__name__", wanted)
        raise UserError(f"{field}: {value!r} is of type {type(value).__name__}; expected {name}")
    return value
