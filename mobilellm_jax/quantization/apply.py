"""Post-training quantization as a map over the table of parameters, and what it takes to store the result.

Fake quantization: weights stay float32, but hold only values that a quantized model has, so evaluation,
zero-shot tasks and generation run unchanged. Quantized are all matrices of the blocks, the embedding and the
head, which in a small model is most of it; gains are not, being few and not multiplied as matrices.
With bfloat16 as compute dtype, the values are rounded once more, as those of the unquantized model are.

Letters: A rows or blocks, I inputs that a product sums over, G groups of them, S inputs of one, B outputs.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mobilellm_jax.config import ExtendedModel, ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.ops.rounding import to_integers
from mobilellm_jax.model.stack import Params, map_parameters
from mobilellm_jax.parameters import Parameter, declared, sizes
from mobilellm_jax.quantization.schemes import Scheme
from mobilellm_jax.roles import science

SCALE_BYTES = 4  # float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedModel(ExtendedModel):
    """A model whose activations are rounded before every product with weights, the head's included."""

    rounded_to: int = science("bits of the activations that weights are multiplied with")

    @property
    def activation_bits(self) -> int:
        return self.rounded_to


def quantize(
    params: Params, config: ModelConfig, scheme: Scheme, short_groups: bool = False
) -> tuple[Params, ModelConfig]:
    """The quantized model: parameters rounded once, and the config under which activations are rounded.

    Rounded parameters are NumPy arrays, as those of a checkpoint.

    Args:
      params: of the model in full precision; they are not changed.
      config: its shape.
      scheme: what to round to.
      short_groups: where groups do not divide the inputs, let the last group of each output be shorter.

    Raises:
      UserError: groups do not divide, or a matrix holds NaN or nothing but zeros.
    """
    check_groups(config, scheme, short_groups)

    def round_one(of: Parameter, w: Any) -> Any:
        return w if of.is_gain else np.asarray(round_weights(of, w, scheme))

    return map_parameters(round_one, params), quantized_config(config, scheme)


def quantized_config(config: ModelConfig, scheme: Scheme) -> ModelConfig:
    if not scheme.activation_bits:
        return config
    return QuantizedModel(**config.plain_fields(), of=config, rounded_to=scheme.activation_bits)


def round_weights(of: Parameter, w: Any, scheme: Scheme) -> Float[Array, "..."]:
    """Quantizes and dequantizes one parameter, of all blocks if it is stacked.

    Raises:
      UserError: it holds NaN or infinite values, or is 0 throughout in some block.
    """
    _check_values(of, w)
    return rounded(of, w, scheme)


def rounded(of: Parameter, w: Any, scheme: Scheme) -> Float[Array, "..."]:
    """As `round_weights`, of any values, which may be traced."""
    q_AGSB, scale_AG1B = _integers(of, w, scheme)
    A, _, _, B = q_AGSB.shape
    inputs = _matrices(of, w).shape[1]
    return (q_AGSB * scale_AG1B).reshape(A, -1, B)[:, :inputs].reshape(w.shape)


def weight_integers(
    of: Parameter, w: Any, scheme: Scheme
) -> tuple[Float[Array, "A G S B"], Float[Array, "A G 1 B"]]:
    """Integers (as floats) and scales of a parameter; a short last group is filled up with zeros.

    Errors as in `round_weights`.
    """
    _check_values(of, w)
    return _integers(of, w, scheme)


def _integers(
    of: Parameter, w: Any, scheme: Scheme
) -> tuple[Float[Array, "A G S B"], Float[Array, "A G 1 B"]]:
    w_AIB = jnp.asarray(_matrices(of, w))
    A, inputs, B = w_AIB.shape
    group = scheme.group or inputs
    w_AIB = jnp.pad(w_AIB, ((0, 0), (0, -inputs % group), (0, 0)))
    return to_integers(w_AIB.reshape(A, -1, group, B), scheme.weight_bits, (2,))


def _matrices(of: Parameter, w: Any) -> Any:
    """A parameter as [A, I, B]: [U, inputs, outputs] of a stack, [V, D, 1] of an embedding."""
    if of.kind == "embedding":
        return w.reshape(w.shape[0], -1, 1)
    first = len(of.stack)
    inputs = int(np.prod(w.shape[first : first + len(of.inputs)]))
    return w.reshape(w.shape[0] if first else 1, inputs, -1)


def _check_values(of: Parameter, w: Any) -> None:
    values = np.asarray(w)
    if not np.isfinite(values).all():
        raise UserError(
            f"parameter {of.path}: holds NaN or infinite values, so it has no range to quantize; "
            "use a checkpoint from before the run diverged"
        )
    for place, block in enumerate(values if of.stack else values[None]):
        if not block.any():
            where = f" of block {place}" if of.stack else ""
            raise UserError(
                f"parameter {of.path}{where}: all weights are 0, so there is no range to quantize"
            )


def rows_of(config: ModelConfig) -> Iterator[tuple[Parameter, int, int]]:
    """The quantized parameters, with the inputs of one output, and the outputs of all blocks."""
    for of in declared(config):
        if not of.is_gain:
            letters = "D" if of.kind == "embedding" else of.inputs
            inputs = int(np.prod(sizes(letters, config)))
            yield of, inputs, int(np.prod(of.shape(config))) // inputs


def short_rows(config: ModelConfig, scheme: Scheme) -> list[str]:
    """Paths of the parameters whose inputs the groups of a scheme do not divide."""
    return [of.path for of, inputs, _ in rows_of(config) if scheme.group and inputs % scheme.group]


def check_groups(config: ModelConfig, scheme: Scheme, short_groups: bool = False) -> None:
    """Checks that groups divide the inputs of every matrix; with `short_groups`, they need not.

    Raises:
      UserError: they do not; the message names the rows, and the groups that would fit all matrices.
    """
    short = set(short_rows(config, scheme))
    if not short or short_groups:
        return
    widths = {of.path: inputs for of, inputs, _ in rows_of(config)}
    common = int(np.gcd.reduce(list(widths.values())))
    fits = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0) or "none but 1"
    wrong = ", ".join(f"{path} ({widths[path]} inputs)" for path in widths if path in short)
    raise UserError(
        f"scheme {scheme.name!r}: groups of {scheme.group} do not divide the rows of {wrong}; groups that "
        f"divide all rows: {fits}. Or allow a shorter last group (--short_groups), or take one scale for "
        f"each output channel: 'w{scheme.weight_bits}'"
    )


def weight_bytes(config: ModelConfig, scheme: Scheme | None) -> int:
    """Bytes of all parameters: integers packed at their bits, float32 scales and gains; None: all float32.

    A shared block is stored once, and so is an embedding that is the head too.
    """
    total = sum(int(np.prod(of.shape(config))) for of in declared(config))
    if scheme is None:
        return 4 * total
    bits = 4 * 8 * (total - sum(inputs * outputs for _, inputs, outputs in rows_of(config)))
    for _, inputs, outputs in rows_of(config):
        groups = -(-inputs // scheme.group) if scheme.group else 1
        bits += outputs * (inputs * scheme.weight_bits + groups * SCALE_BYTES * 8)
    return -(-bits // 8)
