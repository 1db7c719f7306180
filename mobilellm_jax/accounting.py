"""What a shape costs, from the config alone: nothing is allocated or compiled."""

import dataclasses

from mobilellm_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameter counts by part; a shared block counts once.

    Attributes:
      embedding: V D.
      head: V D, or 0 where the head is the embedding.
      attention, ffn: matrices of all distinct blocks.
      norms: RMSNorm gains of all distinct blocks and of the final norm; the paper leaves these out.
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
        """The count that the paper's tables print: without norm gains."""
        return self.total - self.norms


def _block_matrices(config: ModelConfig) -> tuple[int, int]:
    """Returns the weights in the matrices of one block: attention, feed-forward."""
    attention = 2 * config.width * config.head_dim * (config.num_heads + config.num_kv_heads)
    ffn = (3 if config.ffn_kind == "swiglu" else 2) * config.width * config.ffn_width
    return attention, ffn


def parameters(config: ModelConfig) -> Parameters:
    """Returns the parameter counts of a model."""
    attention, ffn = _block_matrices(config)
    embedding = config.vocab_size * config.width
    return Parameters(
        embedding=embedding,
        head=0 if config.share_embedding else embedding,
        attention=config.depth * attention,
        ffn=config.depth * ffn,
        norms=(2 * config.depth + 1) * config.width,
    )


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
    """Returns the FLOPs of matrix products per token of a forward pass over sequences of `length` tokens.

    A multiply-add counts 2; a block counts once for each time it is applied. Attention is causal: position t
    multiplies with t + 1 keys and values, (length + 1) / 2 on average. Left out: norms, softmax, activations,
    rotary positions and the embedding look-up.
    """
    attention, ffn = _block_matrices(config)
    causal = 2 * config.num_heads * config.head_dim * (length + 1) / 2
    layer = attention + ffn + causal
    return 2 * (config.effective_depth * layer + config.width * config.vocab_size)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Returns the FLOPs per token of a training step: the backward pass costs twice the forward pass.

    This counts the model's FLOPs, without what `remat` recomputes.
    """
    return 3 * forward_flops_per_token(config, length)
