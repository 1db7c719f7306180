"""The config of a run: frozen, validated dataclasses, built by `from_config_dict` only.

There are no defaults here: every default value is in `configs/base.py`, with the reason for it. The role of a
field determines where it may differ, see `roles.Role`; its `before` is for configs on disk, older than it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mobilellm_jax import validation as rules
from mobilellm_jax.errors import UserError
from mobilellm_jax.roles import Role, placement, roles_of, science
from mobilellm_jax.sharing import LayerPlan, layer_plan, loop_counts
from mobilellm_jax.train_config import Adapters, TrainConfig
from mobilellm_jax.uses_config import UsesConfig

FFN_KINDS = ("swiglu", "relu", "gelu")
COMPUTE_DTYPES = ("float32", "bfloat16", "auto")
ATTENTION_KERNELS = ("auto", "chunks", "cudnn", "splash")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
REMAT_POLICIES = ("none", "dots", "full")
PARAMETERIZATIONS = ("standard", "mup", "completep")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
TASKS = ("khop", "addition", "recall", "structure", "manipulation", "knowledge", "breadth")  # data/tasks/
_SOURCES = dict.fromkeys(("bundled", "files", "hub", "tfds"), "text") | {"tokens": "token ids"}
_SOURCES |= dict.fromkeys(("conversations", "api_calls"), "conversations") | {task: task for task in TASKS}


def default_ffn_width(ffn_kind: str, width: int) -> int:
    """4 D for two-matrix kinds; for SwiGLU 8/3 D rounded up to a multiple of 256.

    The SwiGLU rule gives every feed-forward width that the paper prints (`param_check` in the tests).
    """
    return 256 * math.ceil(8 * width / (3 * 256)) if ffn_kind == "swiglu" else 4 * width


def _default_head_dim(fields: Mapping[str, Any]) -> int:
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
    return width // heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(UsesConfig):
    """Shape of the transformer. Hashable: a static argument of jitted functions."""

    vocab_size: int = science("V, rows of the embedding; at least the tokenizer's vocabulary")
    depth: int = science("U, number of distinct blocks (the paper's '#layers')", shown=True)
    width: int = science("D, size of the residual stream", shown=True)
    num_heads: int = science("N, query heads", shown=True)
    num_kv_heads: int = science(
        "K, key/value heads; each serves N / K query heads (grouped-query attention); None: N",
        derive=lambda fields: fields["num_heads"],
        shown=True,
    )
    head_dim: int = science(
        "H, size of one head; even, because RoPE rotates pairs; None: D / N", derive=_default_head_dim
    )
    ffn_kind: str = science("'swiglu' (three matrices), 'relu' or 'gelu' (two matrices)")
    ffn_width: int = science(
        "F, hidden size of the feed-forward layer; None: see `default_ffn_width`",
        derive=lambda fields: default_ffn_width(fields["ffn_kind"], fields["width"]),
        shown=True,
    )
    share_embedding: bool = science("the output head uses the embedding matrix (section 2.2.3)")
    sharing: str = science("layer sharing strategy or explicit plan, see `sharing.layer_plan`")
    num_repeats: int = science("times each block is applied under a sharing strategy")
    rope_base: float = science("base of the rotary frequencies")
    norm_epsilon: float = science("added to the mean square in RMSNorm")
    init_std: float = science("standard deviation of every matrix at initialisation")
    parameterization: str = science(
        "'standard' (the paper's), 'mup' or 'completep', see `parameterization.py`"
    )
    base_width: int = science("the width at which 'mup' and 'completep' equal 'standard'")
    base_depth: int = science("the depth at which 'completep' equals 'standard'")
    compute_dtype: str = science(
        "'float32' or 'bfloat16', the dtype of matrix products, or 'auto', whichever of them is faster where "
        "the run starts (records say which); parameters stay float32, and norms, softmax, "
        "logits and loss are computed in float32. On GPU and TPU, float32 products are rounded (TF32, "
        "bfloat16 passes) unless JAX's `jax_default_matmul_precision` says otherwise"
    )
    attention: str = placement(
        "kernel of causal attention in training: 'chunks' (ours), 'cudnn' (NVIDIA GPUs in bfloat16), "
        "'splash' (TPUs), or 'auto', the fastest that the devices have; see `ops/attention.py`",
        before="auto",
    )
    remat: str = placement(
        "what the backward pass recomputes: 'none', all but matrix products ('dots'), or 'full'"
    )
    scan_unroll: int = placement(
        "layers per iteration of the compiled loop over the plan; above 1, the backward pass holds more than "
        "one layer's weights and, whatever `remat` says, activations; as many as layers: no loop"
    )
    loss_chunk: int = placement(
        "sequence positions whose logits exist at one time in the loss; best a divisor of the sequence "
        "length, which is padded to a multiple of it"
    )

    def __post_init__(self) -> None:
        sizes = {field.name for field in dataclasses.fields(self) if field.type is int} - {"loop_rank"}
        rules.check_all(
            self,
            {
                **dict.fromkeys(sizes, rules.POSITIVE_INT),
                **dict.fromkeys(["rope_base", "norm_epsilon", "init_std"], rules.POSITIVE),
                "ffn_kind": rules.one_of(FFN_KINDS),
                "parameterization": rules.one_of(PARAMETERIZATIONS),
                "compute_dtype": rules.one_of(COMPUTE_DTYPES),
                "attention": rules.one_of(ATTENTION_KERNELS),
                "remat": rules.one_of(REMAT_POLICIES),
            },
            "model.",
        )
        if self.num_heads % self.num_kv_heads:
            small = [k for k in range(1, math.isqrt(self.num_heads) + 1) if self.num_heads % k == 0]
            divisors = sorted({*small, *(self.num_heads // k for k in small)})
            raise UserError(
                f"model.num_kv_heads: {self.num_kv_heads} does not divide model.num_heads={self.num_heads}; "
                f"valid: {', '.join(map(str, divisors))}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim: {self.head_dim} is odd; RoPE rotates pairs, use an even size")
        layer_plan(self.sharing, self.depth, self.num_repeats)  # raises if the plan is not valid
        self.check_uses()

    def plain_fields(self) -> dict[str, Any]:
        """The fields of `ModelConfig` by name, without those that a derived class adds."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)}

    @property
    def plan(self) -> LayerPlan:
        """Block index of every layer applied, in order."""
        return layer_plan(self.sharing, self.depth, self.num_repeats)

    @property
    def trained_plan(self) -> LayerPlan:
        return self.plan

    @property
    def activation_bits(self) -> int:
        """Bits that activations are rounded to before products with weights; 0: they are not rounded.

        No field, as nothing is trained so: `quantization.apply.QuantizedModel` has other values.
        """
        return 0

    @property
    def adapters(self) -> Adapters | None:
        """Low-rank updates of matrices, those of `adapters.AdaptedModel`; None: there are none."""

    @property
    def effective_depth(self) -> int:
        """L, the number of layers applied."""
        return len(self.plan)

    @property
    def scaled_depth(self) -> int:
        """Layers that the parameterization scales by; others than L in `loops.LoopedModel`."""
        return len(self.trained_plan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendedModel(ModelConfig):
    """The model `of`, to which a derived class adds something; its multipliers are for the same plan."""

    of: ModelConfig

    @property
    def trained_plan(self) -> LayerPlan:
        return self.of.trained_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source of the text, and its conversion to rows of token ids. See `data/`."""

    source: str = science(
        "'bundled', 'files:<glob>', 'hub:<owner>/<name>', 'tfds:<name>', 'tokens:<glob>' (jsonl of "
        "{'token_ids': [...]}), 'conversations:<glob>' (jsonl of {'messages': [...]}, see `data/chat.py`), "
        "'api_calls:' (conversations that are generated, `data/api_calls.py`), or a synthetic task such as "
        "'khop:...' (`data/tasks/`); of imported weights 'imported', not known",
        compiled=False,
        decisive=True,
        shown=True,
    )
    valid_source: str = science(
        "a source of other text, held out; '' splits `source` by document, or a single text file near its "
        "end; of a task, the same task with other numbers; '' draws other rows. A third of what is held out "
        "is for tuning, see `data/splits.py`",
        compiled=False,
        decisive=True,
    )
    valid_fraction: float = science(
        "share of documents, or of the single text, held out when `valid_source` is ''",
        compiled=False,
        decisive=True,
    )
    text_field: str = science(
        "field or column of the text, where a source has several",
        compiled=False,
        decisive=True,
    )
    tokenizer: str = science(
        "'bytes', 'bpe:<vocabulary size>' (trained on `source` at first use), 'sentencepiece:<file.model>' "
        "or 'huggingface:<tokenizer.json>'; ignored by 'tokens:' sources",
        compiled=False,
        decisive=True,
    )
    sequence_length: int = science(
        "T, tokens a row predicts; attention crosses the borders of documents in a row",
        decisive=True,
        shown=True,
    )
    cache_dir: str = placement("where prepared rows are kept; '~' is expanded", compiled=False)

    def __post_init__(self) -> None:
        rules.check_all(
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
            "data.",
        )
        kinds = [v.partition(":")[0] for v in (self.source, self.valid_source)]
        valid = "'bundled' or one of " + ", ".join(f"'{kind}:...'" for kind in list(_SOURCES)[1:])
        for name, kind, other in zip(("source", "valid_source"), kinds, ("imported", ""), strict=True):
            value = getattr(self, name)
            ok = kind in _SOURCES and (kind == value) == (kind == "bundled")
            rules.check(ok or value == other, f"data.{name}", value, valid)
        if self.valid_source:
            wanted, there = (_SOURCES.get(kind, "none") for kind in kinds)
            rules.check(
                wanted == there, "data.valid_source", self.valid_source, f"{wanted}, like data.source"
            )
        else:
            rules.check(
                0 < self.valid_fraction < 1, "data.valid_fraction", self.valid_fraction, "between 0 and 1"
            )

    @property
    def is_task(self) -> bool:
        """True for a synthetic task, which has right answers but no text."""
        return self.source.partition(":")[0] in TASKS

    @property
    def is_conversations(self) -> bool:
        """True where only replies are targets."""
        return self.source.startswith(("conversations:", "api_calls:"))

    @property
    def has_answers(self) -> bool:
        """True where evaluation compares guesses with targets: of tasks, and of generated API calls."""
        return self.is_task or self.source.startswith("api_calls:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule. See `training/optimizer.py`."""

    name: str = science("'adamw', or 'muon' for the matrices of the blocks (and Adam for the rest)")
    learning_rate: float = science("peak learning rate", compiled=False, shown=True)
    schedule: str = science(
        "'cosine', 'linear', 'wsd' (warm-up, stable, linear decay) or 'constant' (after warm-up)",
        compiled=False,
    )
    warmup_steps: int = science("steps of linear warm-up from 0", compiled=False)
    final_fraction: float = science(
        "where the schedule ends, one step after the last, as a fraction of the peak", compiled=False
    )
    decay_fraction: float = science("share of the steps that 'wsd' spends decaying", compiled=False)
    beta1: float = science("Adam's decay of the mean gradient")
    beta2: float = science("Adam's decay of the mean squared gradient")
    epsilon: float = science("added to what Adam and Muon divide by")
    momentum: float = science("Muon's decay of the mean gradient")
    weight_decay: float = science("decoupled decay, on matrices only (embeddings included, norm gains not)")
    clip_norm: float = science("largest global norm of the gradient; larger gradients are scaled down to it")

    def __post_init__(self) -> None:
        rules.check_all(
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
            "optimizer.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh axes; one may be -1, "all remaining devices". See `parallel/partition.py`.

    Not `compiled`: programs are keyed by the mesh itself.
    """

    data: int = placement("copies of the model, each with its part of the batch", compiled=False)
    fsdp: int = placement(
        "ways in which parameters and optimizer state are split, along with the batch", compiled=False
    )
    tensor: int = placement(
        "ways in which heads, feed-forward width and vocabulary are split", compiled=False
    )

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
            rules.check(self.train.eval_rows > 0, "train.eval_rows", 0, "at least 1: a task never runs out")
        m, loops = self.model, self.train.loops
        most = max(loop_counts(loops, m.sharing, m.num_repeats), default=0)  # raises if they do not fit
        if most > m.num_repeats and (field := m.differing_uses) not in ("", "loop_norm"):
            raise UserError(
                f"train.loops: {loops!r} has more loops than model.num_repeats={m.num_repeats}, for which "
                f"model.{field}={getattr(m, field)!r} has parameters; use model.num_repeats={most}"
            )
        if self.optimizer.name == "muon":  # the table of multipliers is for Adam
            standard = self.model.parameterization == "standard"
            valid = "'standard', the only one for optimizer.name='muon'"
            rules.check(standard, "model.parameterization", self.model.parameterization, valid)


def from_config_dict(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates a `Config` from a `ConfigDict` or nested mappings, such as parsed JSON.

    Raises:
      UserError: a field is unknown, missing, of the wrong type or out of range; the message names it.
    """
    return rules.from_mapping(Config, values, widen=True)


def to_dict(config: Config) -> dict[str, Any]:
    """Converts to nested plain dictionaries, ready for JSON; inverse of `from_config_dict`."""
    return dataclasses.asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries to dotted names: {"model.width": 64, ...}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _where(has: Callable[[Role], bool]) -> frozenset[str]:
    return frozenset(name for name, role in ROLES.items() if has(role))


# Sets of dotted field names, one for each property of a role.
ROLES = roles_of(Config)
RESUMABLE = _where(lambda role: role.resumable)
COMPILED = _where(lambda role: role.compiled)
SEEDS = _where(lambda role: role.kind == "identity")
IDLE = _where(lambda role: role.idle)
DECISIVE = _where(lambda role: role.decisive)
SHOWN = _where(lambda role: role.shown)
BEFORE = {name: role.before for name, role in ROLES.items() if role.before is not None}  # in older configs
