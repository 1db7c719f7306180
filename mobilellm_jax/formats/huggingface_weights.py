"""Import and export of the weights of Hugging Face's Llama as safetensors.

A linear layer there is stored [out, in], here [in, out] with heads as axes of their own; blocks are stacked
here. Both pair the dimensions i and i + H/2 of a head in RoPE, so weights only change their layout, and a
round trip is bit-exact. Letters as in `model/__init__.py`.

Llama has no layer sharing: an exported model has one layer for each layer *applied*, in plan order; given the
plan, import folds them back. The multipliers of muP and CompleteP are multiplied into the weights.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.huggingface_config import read_object
from mobilellm_jax.model.parameterization import multipliers
from mobilellm_jax.parameters import Parameter, declared, nest, parameter, sizes
from mobilellm_jax.sharing import LayerPlan

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_HOW_TO_CONVERT = (
    "only safetensors are read, as unpickling a .bin or .pt file can run any code; if you trust it, convert "
    "it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new), in transformers"
)

# --- location of tensors ------------------------------------------------------------------------------

_HEAD = parameter("head").hugging_face


class Place(NamedTuple):
    """The location of a tensor in our parameters.

    Attributes:
      parameter: its declaration.
      at: its index in the stack; None for parameters that are not stacked.
      shape: its shape in the file.
    """

    parameter: Parameter
    at: int | None
    shape: tuple[int, ...]

    def leaf(self, params: model.Params) -> np.ndarray:
        """The view of `params` for this tensor, in our layout."""
        array: Any = params
        for name in self.parameter.path.split("/"):
            array = array[name]
        return array if self.at is None else array[self.at]

    def read(self, tensor: np.ndarray, leaf: np.ndarray) -> np.ndarray:
        """A tensor of the file in our layout, which is that of `leaf`."""
        return (tensor.T if self.parameter.kind == "matrix" else tensor).reshape(leaf.shape)

    def write(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `read`."""
        return leaf.reshape(self.shape[::-1]).T if self.parameter.kind == "matrix" else leaf


def places(config: ModelConfig, layers: LayerPlan) -> dict[str, Place]:
    """The place of every tensor in the file, by name; `layers` is the block of each layer."""

    def place(of: Parameter, index: int | None) -> Place:
        if of.kind != "matrix":
            return Place(of, index, of.unstacked_shape(config))
        outputs, inputs = (math.prod(sizes(letters, config)) for letters in (of.outputs, of.inputs))
        return Place(of, index, (outputs, inputs))

    rows = declared(config)
    found = {of.hugging_face: place(of, None) for of in rows if not of.stack}
    for layer, block in enumerate(layers):
        for of in rows:
            if of.stack:
                index = block if of.stack == "U" else layer
                found[of.hugging_face.format(layer=layer)] = place(of, index)
    return found


# --- import -------------------------------------------------------------------------------------------------


def read_params(folder: Path, config: ModelConfig, layers: LayerPlan) -> model.Params:
    """Reads the weights in a folder as float32 NumPy parameters; the conversion is exact.

    Layers of the same block must be bit-identical.

    All names, shapes and dtypes are checked before the first is read; then tensors are read one by one, so
    that no more than the model and one tensor are in memory.

    Raises:
      UserError: no safetensors, a file that is missing or corrupt, a tensor that is missing, unknown, or of
        another shape or dtype, or layers of one block that differ.
    """
    wanted = places(config, layers)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        spare = _check_names(folder, tensors, wanted, config)
        for name, place in wanted.items():
            _check_tensor(folder, name, tensors[name].get_slice(name), place.shape)
        params = nest({of.path: np.empty(of.shape(config), np.float32) for of in declared(config)})
        first: dict[tuple[Any, ...], str] = {}
        for name, place in wanted.items():
            leaf = place.leaf(params)
            tensor = tensors[name].get_tensor(name).astype(np.float32, copy=False)
            tensor = place.read(tensor, leaf)
            same = first.setdefault((place.parameter.path, place.at), name)
            if same == name:
                leaf[...] = tensor
            elif not _same_bits(leaf, tensor):
                raise UserError(
                    f"{folder}: {name} differs from {same}, but by the plan {' '.join(map(str, layers))} "
                    "they are one block; change or omit --sharing"
                )
        for name in spare:
            _check_spare(folder, name, tensors[name].get_tensor(name), params, config)
    return params


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether float32 arrays are equal, also in NaN and in the sign of zero."""
    return np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Opens the safetensors files; the file of every tensor, by the tensor's name."""
    index = folder / INDEX
    said: dict[str, Any] | None = None
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif index.is_file():
        said = read_object(index).get("weight_map")
        if not isinstance(said, dict) or not all(isinstance(name, str) for name in said.values()):
            raise UserError(f"{index}: weight_map is missing, or is not a mapping from tensors to files")
        names = sorted(set(said.values()))
    else:
        pickles = sorted(p.name for kind in ("bin", "pt", "pth") for p in folder.glob(f"*.{kind}"))
        there = f" (found {pickles[0]})" if pickles else ""
        raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}{there}; {_HOW_TO_CONVERT}")
    tensors: dict[str, Any] = {}
    for name in names:
        # A path could lead out of the folder. Links are followed: the hub's cache consists of them.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not the name of a safetensors file in the folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing, but listed in {INDEX}")
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: truncated or not a safetensors file ({error})") from None
        for tensor in file.keys():  # noqa: SIM118, not a mapping
            if tensor in tensors or (said is not None and said.get(tensor) != name):
                raise UserError(f"{folder / name}: contains {tensor}, which {INDEX} lists in another file")
            tensors[tensor] = file
    return tensors


def _check_names(
    folder: Path, tensors: Mapping[str, Any], wanted: Mapping[str, Place], config: ModelConfig
) -> list[str]:
    """Checks the names; gives those of redundant tensors (tied head, rotary frequencies)."""
    missing = [name for name in wanted if name not in tensors]
    if missing:
        hint = "; config.json does not tie the head to the embedding" if missing == [_HEAD] else ""
        raise UserError(f"{folder}: {_some(missing)} missing{hint}")
    spare = [name for name in tensors if name not in wanted]
    unknown = [
        name
        for name in spare
        if not name.endswith("rotary_emb.inv_freq") and not (name == _HEAD and config.share_embedding)
    ]
    if unknown:
        raise UserError(f"{folder}: {_some(unknown)} not part of a Llama with this config.json")
    return spare


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def _check_tensor(folder: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if tuple(tensor.get_shape()) != shape:
        raise UserError(f"{folder}: {name} has shape {tuple(tensor.get_shape())}, but {shape} by config.json")
    if tensor.get_dtype() not in _DTYPES.values():
        raise UserError(
            f"{folder}: {name} is of type {tensor.get_dtype()}; expected one of {', '.join(_DTYPES.values())}"
        )


def _check_spare(
    folder: Path, name: str, value: np.ndarray, params: model.Params, config: ModelConfig
) -> None:
    """Checks a redundant tensor against the parameters or the config."""
    if name == _HEAD:
        same = value.shape == params["embedding"].shape
        same = same and _same_bits(value.astype(np.float32), params["embedding"])
        what = "the embedding, which config.json ties it to"
    else:
        frequency_h = config.rope_base ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        same = value.shape == frequency_h.shape
        same = same and np.allclose(value.astype(np.float64), frequency_h, rtol=0.01)  # bfloat16 has 3 digits
        what = "the rope_theta of config.json"
    if not same:
        raise UserError(f"{folder}: {name} differs from {what}")


# --- export ------------------------------------------------------------------------------------------------

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # by the value of --type


def write_params(path: Path, params: model.Params, config: ModelConfig, dtype: str) -> None:
    """Writes the weights as one safetensors file, tensor by tensor.

    float32 is exact, except for the multipliers of muP and CompleteP: a product with one that is not a power
    of two is rounded.

    Raises:
      UserError: a weight is too large for `dtype`.
    """
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    wanted = places(config, config.plan)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    end = 0
    for name, place in wanted.items():
        start, end = end, end + math.prod(place.shape) * kind.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": place.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors(params, config):
            with np.errstate(over="ignore"):
                cast = tensor.astype(kind)
            if np.isinf(cast.astype(np.float32)).any() and not np.isinf(tensor).any():
                raise UserError(
                    f"--type={_DTYPES[dtype].lower()}: {name} has weights that are too large for it; use "
                    "--type=f32"
                )
            file.write(np.ascontiguousarray(cast).tobytes())


def tensors(params: model.Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and float32 tensors, a layer for each applied, in the layout of a Llama, scaled."""
    m = multipliers(config)
    for name, place in places(config, config.plan).items():
        tensor = place.write(place.leaf(params))
        scale = getattr(m, place.parameter.multiplier) if place.parameter.multiplier else 1.0
        yield name, tensor if scale == 1.0 else (tensor.astype(np.float64) * scale).astype(np.float32)


def check_values(name: str, tensor: np.ndarray) -> None:
    """Raises UserError for weights that no model has: NaN, infinite, or all 0."""
    if not np.isfinite(tensor).all():
        raise UserError(f"{name}: has NaN or infinite weights; export another checkpoint")
    if not tensor.any():
        raise UserError(f"{name}: all weights are 0; export another checkpoint")
