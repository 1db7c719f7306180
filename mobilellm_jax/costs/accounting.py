"""Costs of a shape, from the config alone: nothing is allocated or compiled."""

import dataclasses
import itertools
import math
from collections.abc import Callable

from mobilellm_jax.chunks import mean_keys
from mobilellm_jax.config import DTYPE_BYTES, Config, ModelConfig
from mobilellm_jax.costs.latency import Latency
from mobilellm_jax.loops import with_repeats
from mobilellm_jax.parameters import declared
from mobilellm_jax.sharing import loop_counts


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameter counts by part; a shared block counts once.

    Attributes:
      embedding: V D.
      head: V D, or 0 if the head is the embedding.
      attention, ffn: matrices of all distinct blocks, and their updates for uses of a block; those outside of
        attention count as ffn.
      norms: RMSNorm gains of all distinct blocks, or of all uses, and of the final norm; factors on residual
        branches; the paper omits these.
    """

    embedding: int
    head: int
    attention: int
    ffn: int
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.attention + self.ffn + self.norms

    @property
    def non_embedding(self) -> int:
        """All but embedding and head."""
        return self.attention + self.ffn + self.norms

    @property
    def as_printed(self) -> int:
        """Count without norm gains, as in the paper's tables."""
        return self.total - self.norms


def parameters(config: ModelConfig) -> Parameters:
    counts = {field.name: 0 for field in dataclasses.fields(Parameters)}
    for p in (p for p in declared(config) if p.kind != "adapter"):
        of_block = "attention" if "/attention/" in p.path else "ffn"
        part = "norms" if p.is_gain else p.path if p.path in counts else of_block
        counts[part] += math.prod(p.shape(config))
    return Parameters(**counts)


def adapters(config: ModelConfig) -> int:
    """Number of parameters of the adapters; they are no part of `parameters`, into which they are merged."""
    return sum(math.prod(p.shape(config)) for p in declared(config) if p.kind == "adapter")


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs per token of the matrix products in a forward pass over sequences of `length` tokens.

    A multiply-add counts 2; a block counts once for each time it is applied. Attention is causal: position t
    multiplies with t + 1 keys and values, (length + 1) / 2 on average. Not counted: norms, softmax,
    activations, rotary positions, the embedding look-up, and sums of matrices with the updates of uses.
    """
    return _forward_flops(config, keys=(length + 1) / 2)


def executed_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs per token that the forward pass executes: `forward_flops_per_token` plus masked keys.

    `attention.py` multiplies a chunk of queries with all keys up to the last of them. By XLA's own count, the
    compiled program takes 0.4 to 0.6 % more (384 wide, 64 tokens): the operations that are not counted here.
    """
    return _forward_flops(config, keys=mean_keys(length))


def executed_train_flops_per_token(
    config: ModelConfig, length: int, teacher: ModelConfig | None = None
) -> float:
    """FLOPs per token that a training step executes, without recomputation by `remat`.

    Three times the forward pass, plus the attention scores once more, which are never stored, plus the sums
    over H that `attention.py` computes as products with ones; and one forward pass of a teacher.
    """
    scores = 2 * config.num_heads * config.head_dim * (mean_keys(length) + 1)
    taught = executed_flops_per_token(teacher, length) if teacher else 0.0
    return 3 * executed_flops_per_token(config, length) + config.effective_depth * scores + taught


def _forward_flops(config: ModelConfig, keys: float) -> float:
    matrices = sum(math.prod(p.unstacked_shape(config)) for p in declared(config) if p.kind == "matrix")
    layer = matrices + 2 * config.num_heads * config.head_dim * keys
    return 2 * (config.effective_depth * layer + config.width * config.vocab_size)


def train_flops_per_token(config: ModelConfig, length: int, teacher: ModelConfig | None = None) -> float:
    """FLOPs per token of a training step: the backward pass costs twice the forward pass.

    These are the model's FLOPs, without recomputation by `remat`, and those of a teacher's forward pass: one
    of k times the size of the model adds about k / 3.
    """
    taught = forward_flops_per_token(teacher, length) if teacher else 0.0
    return 3 * forward_flops_per_token(config, length) + taught


def over_loops(config: Config, cost: Callable[[ModelConfig], int | float]) -> float:
    """Mean cost of a training step of a run over the numbers of loops that are drawn, all alike."""
    m = config.model
    counts = loop_counts(config.train.loops, m.sharing, m.num_repeats) or (m.num_repeats,)
    return sum(cost(m if count == m.num_repeats else with_repeats(m, count)) for count in counts) / len(
        counts
    )


def kv_cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of the key/value cache per token of context: 2 K H numbers for every layer applied.

    They have the compute dtype. A shared block has a cache for each of its uses, since its inputs differ.
    """
    per_layer = 2 * config.num_kv_heads * config.head_dim
    return config.effective_depth * per_layer * DTYPE_BYTES[config.compute_dtype]


def decode_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of weights read to generate one token, with all weights in the compute dtype.

    Counts the blocks in the order of the plan, the final norm, the head, and one row of the embedding. A
    block used several times in a row is read once; one used again later is read again: the paper's reason
    for `immediate` is that one block fits into the fast memory (SRAM) of a phone and the whole stack does
    not (section 2.3). Not counted: the key/value cache, and activations.
    """
    reads = sum(1 for _ in itertools.groupby(config.plan))
    times = {"U": reads, "L": config.effective_depth, "": 1}
    numbers = config.width  # the row of the embedding
    for p in declared(config):
        if p.path != "head":  # the embedding stands for it: the same size, and only one of them is read whole
            numbers += times[p.stack] * math.prod(p.unstacked_shape(config))
    return numbers * DTYPE_BYTES[config.compute_dtype]


def optimizer_bytes(config: ModelConfig) -> int:
    """Bytes of parameters, gradients and AdamW's two moments, all float32.

    Frozen parameters have neither of the latter, but for the gradients of the block at work.
    """
    total, trained = parameters(config).total, adapters(config)
    return 4 * (total + 4 * trained) if trained else 4 * 4 * total


def kept_activation_bytes(config: ModelConfig, length: int, rows: int) -> int:
    """Bytes of activations that one layer applied stores for its backward pass, for `rows` rows of `length`.

    By the `remat` policy:
      full: the layer's input.
      dots: its input, and the matrix products with weights that the backward pass needs: queries, keys,
        values, the output of attention before and after its matrix, and the input of the activation function
        of the feed-forward layer. Also a logarithm for each head, in float32.
      none: all residuals of differentiation. Norms (6 D and 4 numbers), rotated queries and keys, and the
        logarithms of attention (N) are float32, the rest has the compute dtype.
    These are the residuals that JAX saves, to the byte (from 0.11 on, F numbers less for GELU). The attention
    weights are not among them.
    """
    c = DTYPE_BYTES[config.compute_dtype]
    D, N, K, F = config.width, config.num_heads, config.num_kv_heads, config.ffn_width
    H, two_inputs = config.head_dim, config.ffn_kind == "swiglu"
    if config.remat == "full":
        return rows * length * c * D
    if config.remat == "dots":
        return rows * length * (c * (2 * D + 2 * (N + K) * H + (2 if two_inputs else 1) * F) + 4 * N)
    norms = 4 * (6 * D + 4) + c * 2 * D
    attention = (4 + c) * (N + K) * H + 4 * N
    ffn = {"swiglu": 3 * c, "relu": 1 + c, "gelu": 6 * c}[config.ffn_kind] * F  # the sign of ReLU is one byte
    return rows * length * (norms + attention + ffn) + 4 * 2 * D  # and the gains of two norms


def activation_bytes(config: ModelConfig, length: int, rows: int, teacher: ModelConfig | None = None) -> int:
    """Estimates the peak bytes of activations in a training step on `rows` rows of `length` tokens.

    The sum of the activations that layers and final norm store for the backward pass, and of the larger of
    two transients: the working set of the current layer (its residuals, copied from the stack or recomputed,
    the gradients of SwiGLU's operands, the attention weights and their gradient), or the logits of one
    `loss_chunk` and their gradient. `rows` is one micro-batch over all devices.

    This is 100 to 112 % without remat, and 88 to 119 % with it, of the memory that XLA on a CPU allocates for
    the gradients of five float32 models (48 to 128 wide, 2 to 8 layers, 128 and 512 tokens). Not counted: the
    gradients (see `optimizer_bytes`), the workspace of single operations, `scan_unroll` above 1, and the
    float32 copies in which XLA on a CPU computes most of bfloat16.

    With a teacher, its last hidden states are kept as well, its layer at work and its logits of one
    `loss_chunk` are transients, and so are the targets made of them.
    """
    c = DTYPE_BYTES[config.compute_dtype]
    layers = config.effective_depth * kept_activation_bytes(config, length, rows)
    final_norm = rows * length * (4 * (3 * config.width + 2) + c * config.width)
    at_work = kept_activation_bytes(dataclasses.replace(config, remat="none"), length, rows)
    if config.ffn_kind == "swiglu":
        at_work += 2 * c * rows * length * config.ffn_width
    at_work += int(rows * config.num_heads * length * mean_keys(length)) * (4 + c)
    logits = rows * min(config.loss_chunk, length) * config.vocab_size
    if teacher is None:
        return layers + final_norm + max(at_work, logits * (4 + c))
    taught = kept_activation_bytes(dataclasses.replace(teacher, remat="none"), length, rows)
    kept = rows * length * c * teacher.width
    return layers + final_norm + kept + max(at_work, taught, logits * (4 + c + 2 * 4))


def run_budgets(
    config: Config, teacher: ModelConfig | None = None, latency: Latency | None = None
) -> dict[str, int | float]:
    """The `budgets` of a run, which may draw its number of loops at each step, and may have a teacher.

    Training FLOPs are then a mean over the numbers, and the memory of activations that of the most loops.
    """
    m, length = config.model, config.data.sequence_length
    rows = config.train.batch_size // config.train.accumulation_steps
    counts = loop_counts(config.train.loops, m.sharing, m.num_repeats)
    largest = with_repeats(m, counts[-1]) if counts else m
    return budgets(m, length, rows, latency) | {
        "train_flops_per_token": over_loops(config, lambda m: train_flops_per_token(m, length, teacher)),
        "activation_bytes": activation_bytes(largest, length, rows, teacher),
    }


def budgets(
    config: ModelConfig, length: int, rows: int, latency: Latency | None = None
) -> dict[str, int | float]:
    """All costs of a shape by name: the one that a study matches, and those that it must report as well.

    Args:
      config: the model.
      length: tokens of a row.
      rows: rows of a micro-batch, for `activation_bytes` only.
      latency: of a device; gives `decode_ms`, of a token with a cache of `length`, and `prefill_ms`, of a
        prompt of half as many tokens.
    """
    counts = parameters(config)
    on_device = latency.predict(config, length) if latency else {}
    return {
        "total_parameters": counts.total,
        "embedding_parameters": counts.embedding + counts.head,
        "non_embedding_parameters": counts.non_embedding,
        "train_flops_per_token": train_flops_per_token(config, length),
        "inference_flops_per_token": forward_flops_per_token(config, length),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "decode_bytes_per_token": decode_bytes_per_token(config),
        "optimizer_bytes": optimizer_bytes(config),
        "activation_bytes": activation_bytes(config, length, rows),
        **on_device,
    }
