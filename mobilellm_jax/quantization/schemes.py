"""Schemes of quantization, and their names: "w8a8", "w8", "w4:32"."""

import dataclasses
import re

from mobilellm_jax.errors import UserError

EXAMPLES = "w8a8, w8, w4, w4:32 or w3:32"
_FEWEST, _MOST = 2, 8


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a model is quantized after training: symmetric, min-max, to the nearest integer.

    Table 15 of the paper is "w8a8": min-max, weights by output channel, activations by token. The paper does
    not say whether its ranges are symmetric, nor what it does with embedding and head; here they are, and
    both are quantized.

    Attributes:
      weight_bits: bits of the integers that weights are rounded to.
      group: inputs of one output that share a scale; 0: all of them, a scale for each output channel.
      activation_bits: bits of what is multiplied with weights, a scale for each token; 0: not quantized.
    """

    weight_bits: int
    group: int = 0
    activation_bits: int = 0

    @property
    def name(self) -> str:
        activations = f"a{self.activation_bits}" if self.activation_bits else ""
        return f"w{self.weight_bits}{activations}" + (f":{self.group}" if self.group else "")


def parse(name: str) -> Scheme:
    """Reads a name such as "w8a8" or "w4:32": bits of weights, bits of activations, size of a group.

    Raises:
      UserError: there is no such scheme.
    """
    found = re.fullmatch(r"w(\d{1,2})(?:a(\d{1,2}))?(?::(\d{1,6}))?", name)
    if not found:
        raise UserError(f"scheme {name!r}: expected w<bits>[a<bits>][:<group>], such as {EXAMPLES}")
    weights, activations, group = (None if part is None else int(part) for part in found.groups())
    for what, bits in (("weights", weights), ("activations", activations)):
        if bits is not None and not _FEWEST <= bits <= _MOST:
            raise UserError(
                f"scheme {name!r}: {bits} bits for {what}; expected {_FEWEST} to {_MOST}, such as {EXAMPLES}"
            )
    if group == 0:
        raise UserError(
            f"scheme {name!r}: groups of 0 weights; expected at least 1, or leave out ':0' for one scale "
            "for each output channel"
        )
    assert weights is not None
    return Scheme(weights, group or 0, activations or 0)
