"""Scaling of initialisation, forward pass and optimizer with width and depth: one table of multipliers.

| multiplier of          | standard | mup       | completep        |
|------------------------|----------|-----------|------------------|
| init std of matrices   | 1        | m_D^-1/2  | m_D^-1/2         |
| residual branches      | 1        | 1         | 1 / m_L          |
| logits                 | 1        | 1 / m_D   | 1 / m_D          |
| learning rate, matrices| 1        | 1 / m_D   | 1 / m_D          |
| weight decay, matrices | 1        | m_D       | m_D              |
| Adam's epsilon, blocks | 1        | 1 / m_D   | 1 / (m_D m_U)    |
| Adam's epsilon, uses   | 1        | 1 / m_D   | 1 / (m_D m_L)    |
| Adam's epsilon, others | 1        | 1 / m_D   | 1 / m_D          |

m_D = width / base_width, m_L = effective_depth / base_depth, m_U = depth / base_depth. With another number
of loops than in training, m_L is that of training: `loops.with_repeats` says why. "Matrices" are those of the
blocks; embedding, head and norm gains keep their init and learning rate. "Uses" are parameters that each
layer applied has of its own (`uses.py`), whose gradients have one term. `standard` is MobileLLM's.
`mup` is Yang et al. (2022, arXiv 2203.03466), `completep` Dey et al. (2025, arXiv 2505.01618, table 1 with
alpha = 1). The learning rate times the weight decay, the effective decay of a weight, is the same for all
shapes. Attention keeps its scale 1 / sqrt(H), so the head size must stay fixed while the width changes.
Clipping by the global norm comes before Adam and scales all gradients of a step by the same factor; no rule
here accounts for it.

Layer sharing. The depth multiplier bounds the sum over the residual stream, which has one term for each layer
*applied*, so the branches are divided by the effective depth. With alpha = 1 the updates of the layers add up
coherently (each 1 / m_L, so the sum is constant), for several uses of one block as for different blocks: the
learning rate needs no correction for sharing. The gradient of a block is the sum over its m_L / m_U uses,
each 1 / m_L in size, so Adam's epsilon scales with the number of *distinct* blocks. (At initialisation the
branches of different blocks add up at random, to m_L^-1/2, and those of one block coherently, to a constant:
a shared stack starts further from the identity, but no deeper stack explodes.)
"""

import dataclasses

from mobilellm_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Factors on the values in the config; all 1 under "standard", and at the base shape."""

    init_std: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    learning_rate: float = 1.0
    epsilon_blocks: float = 1.0
    epsilon_uses: float = 1.0
    epsilon_others: float = 1.0


def multipliers(config: ModelConfig) -> Multipliers:
    """Computes the column of the table above for `config.parameterization`."""
    if config.parameterization == "standard":
        return Multipliers()
    over_width = config.base_width / config.width
    by_width = Multipliers(
        init_std=over_width**0.5,
        logits=over_width,
        learning_rate=over_width,
        epsilon_blocks=over_width,
        epsilon_uses=over_width,
        epsilon_others=over_width,
    )
    if config.parameterization == "mup":
        return by_width
    return dataclasses.replace(
        by_width,
        residual=config.base_depth / config.scaled_depth,
        epsilon_blocks=over_width * config.base_depth / config.depth,
        epsilon_uses=over_width * config.base_depth / config.scaled_depth,
    )
