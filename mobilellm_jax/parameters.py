"""The table of parameters: path, axes, kind and name in Hugging Face's Llama.

Shapes, counts, shardings, casts, weight decay, learning rates and exported tensors are maps over this table.
To add a parameter, add a row here and use it in `model/block.py`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError

Kind = Literal["embedding", "matrix", "gain", "adapter", "update"]
ADAPTER = "_adapter"  # after the path of a matrix: the folder of its adapter


class Axis(NamedTuple):
    size: str  # a field of ModelConfig
    mesh: str | None  # the mesh axis that splits it


# Letter of an array axis -> its size, and the mesh axis that splits it. Stacks are replicated: split, every
# layer would transfer its block.
AXES = {
    "U": Axis("depth", None),  # stack over distinct blocks
    "L": Axis("scaled_depth", None),  # stack over layers applied in training
    "D": Axis("width", "fsdp"),
    "N": Axis("num_heads", "tensor"),
    "K": Axis("num_kv_heads", "tensor"),
    "H": Axis("head_dim", None),
    "F": Axis("ffn_width", "tensor"),
    "V": Axis("vocab_size", "tensor"),
    "R": Axis("adapter_rank", None),  # of `adapters.AdaptedModel`
    "M": Axis("loop_rank", None),
    "C": Axis("num_uses", None),
}
_STACKS = "UL"

Condition = Callable[[ModelConfig], bool]


def _always(config: ModelConfig) -> bool:
    return True


def _untied(config: ModelConfig) -> bool:
    return not config.share_embedding


def _gated(config: ModelConfig) -> bool:
    return config.ffn_kind == "swiglu"


def _common_gains(config: ModelConfig) -> bool:
    return not config.loop_gains


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter, float32 in training.

    Attributes:
      path: slash-separated keys of the array in the parameter tree.
      letters: its axes, as in `AXES`; a matrix has an arrow from inputs to outputs, "U D -> N H".
      kind: "embedding" and "matrix" are cast to the compute dtype and decayed. A "matrix" multiplies
        activations in every layer: Muon orthogonalises it, muP scales its initialisation and learning rate.
        A "gain" stays float32, is replicated on every device and is not decayed. The two matrices of an
        "adapter" are decayed; Adam updates them at the learning rate of the config, whatever the others have.
        So are those of an "update", which is that of one use of a block, and is part of the model.
      hugging_face: name of the tensor in a Llama of Hugging Face, with {layer} where it is stacked. A matrix
        is stored [outputs, inputs] there, everything else as here. "" for adapters, which are merged, and for
        what uses of a block have of their own, which is written into a block for each, see `model/uses.py`.
      multiplier: the field of `parameterization.Multipliers` that is folded into the exported tensor.
      condition: True for configs whose model has this parameter.
    """

    path: str
    letters: str
    kind: Kind
    hugging_face: str
    multiplier: str | None = None
    condition: Condition = _always

    @cached_property
    def axes(self) -> str:
        return self.letters.replace("->", "").replace(" ", "")

    @cached_property
    def stack(self) -> str:
        """Letter of the leading axis that stacks blocks or layers, or "". Uses (C) are not stacked."""
        return self.axes[0] if self.axes[0] in _STACKS else ""

    @cached_property
    def inputs(self) -> str:
        return self.letters.partition("->")[0].replace(" ", "").removeprefix(self.stack)

    @cached_property
    def outputs(self) -> str:
        return self.letters.partition("->")[2].replace(" ", "")

    @property
    def is_gain(self) -> bool:
        """True for a parameter that is neither cast nor decayed. A stacked gain has two axes, as a matrix."""
        return self.kind == "gain"

    @cached_property
    def mesh_axes(self) -> tuple[str | None, ...]:
        """Mesh axis that splits each array axis; where several have the same one, only the first is split."""
        axes = [None if self.is_gain else AXES[letter].mesh for letter in self.axes]
        return tuple(None if axis in axes[:i] else axis for i, axis in enumerate(axes))

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return sizes(self.axes, config)

    def unstacked_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape without the stack axis."""
        return sizes(self.axes.removeprefix(self.stack), config)


def _in_block(
    path: str,
    letters: str,
    kind: Kind,
    hugging_face: str,
    multiplier: str | None = None,
    condition: Condition = _always,
) -> Parameter:
    there = f"model.layers.{{layer}}.{hugging_face}.weight"
    return Parameter(f"blocks/{path}", letters, kind, there, multiplier, condition)


def _update(of: Parameter) -> list[Parameter]:
    """The rows of the update of a matrix for each use, from its inputs to M numbers, and to its outputs."""

    def has(config: ModelConfig) -> bool:
        there = config.loop_rank > 0 and of.condition(config)
        return there and re.search(config.loop_targets, of.path) is not None

    letters = {"reduce": f"L {of.inputs} -> M", "expand": f"L M -> {of.outputs}"}
    path = of.path.replace("blocks/", "loops/")
    return [Parameter(f"{path}/{name}", axes, "update", "", condition=has) for name, axes in letters.items()]


def _adapter(of: Parameter) -> list[Parameter]:
    """The rows of the adapter of a matrix, from its inputs to R numbers and from these to its outputs."""

    def has(config: ModelConfig) -> bool:
        return config.adapters is not None and of.path in config.adapters.targets

    letters = {"reduce": f"{of.stack} {of.inputs} -> R", "expand": f"{of.stack} R -> {of.outputs}"}
    return [
        Parameter(f"{of.path}{ADAPTER}/{name}", axes, "adapter", "", condition=has)
        for name, axes in letters.items()
    ]


_MODEL = {
    parameter.path: parameter
    for parameter in (
        Parameter("embedding", "V D", "embedding", "model.embed_tokens.weight"),
        # Tied to the embedding, the head cannot be scaled; the norm before it can, to the same effect.
        Parameter("final_norm/gain", "D", "gain", "model.norm.weight", multiplier="logits"),
        Parameter("head", "V D", "embedding", "lm_head.weight", condition=_untied),
        _in_block("attention_norm/gain", "U D", "gain", "input_layernorm", condition=_common_gains),
        _in_block("attention/query", "U D -> N H", "matrix", "self_attn.q_proj"),
        _in_block("attention/key", "U D -> K H", "matrix", "self_attn.k_proj"),
        _in_block("attention/value", "U D -> K H", "matrix", "self_attn.v_proj"),
        _in_block("attention/output", "U N H -> D", "matrix", "self_attn.o_proj", multiplier="residual"),
        _in_block("ffn_norm/gain", "U D", "gain", "post_attention_layernorm", condition=_common_gains),
        _in_block("ffn/gate", "U D -> F", "matrix", "mlp.gate_proj", condition=_gated),
        _in_block("ffn/up", "U D -> F", "matrix", "mlp.up_proj"),
        _in_block("ffn/down", "U F -> D", "matrix", "mlp.down_proj", multiplier="residual"),
    )
}

# What uses of one block do not share.
_USES = [
    Parameter("loops/attention_norm/gain", "L D", "gain", "", condition=lambda c: c.loop_gains),
    Parameter("loops/ffn_norm/gain", "L D", "gain", "", condition=lambda c: c.loop_gains),
    Parameter("loops/attention/scale", "L", "gain", "", condition=lambda c: c.loop_scale == "learned"),
    Parameter("loops/ffn/scale", "L", "gain", "", condition=lambda c: c.loop_scale == "learned"),
    Parameter("loops/embedding", "C D", "embedding", "", condition=lambda c: c.loop_embedding),
    Parameter("loops/norm/gain", "D", "gain", "", condition=lambda c: c.loop_norm),
]
_MATRICES = [of for of in _MODEL.values() if of.kind == "matrix"]
_UPDATES = [row for of in _MATRICES for row in _update(of)]
_ADAPTERS = [row for of in _MATRICES for row in _adapter(of)]
PARAMETERS = {row.path: row for row in (*_MODEL.values(), *_USES, *_UPDATES, *_ADAPTERS)}


def parameter(path: str) -> Parameter:
    """Looks up the row of a path.

    Raises:
      UserError: the table has no such row.
    """
    if path not in PARAMETERS:
        raise UserError(f"parameter {path!r}: has no row in mobilellm_jax/parameters.py; add one")
    return PARAMETERS[path]


def declared(config: ModelConfig) -> list[Parameter]:
    """Parameters of the config's model, in the order of the table."""
    return [parameter for parameter in PARAMETERS.values() if parameter.condition(config)]


def sizes(letters: str, config: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(config, AXES[letter].size) for letter in letters)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Converts {"blocks/ffn/up": x} to nested dictionaries, the parameter tree of the model."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branches, name = path.split("/")
        branch = tree
        for key in branches:
            branch = branch.setdefault(key, {})
        branch[name] = leaf
    return tree
