"""Import and export of config.json of Hugging Face's Llama. Unsupported settings are refused by name."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.sharing import STRATEGIES, layer_plan
from mobilellm_jax.storage.sealed import parse

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mobilellm": "MobileLLMForCausalLM"}  # by model_type
_ONLY = {  # the only supported values of these fields (None: absent or null)
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file is missing or is not a JSON object.
    """
    try:
        values = parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def model_fields(hf: Mapping[str, Any], sharing: str = "", num_repeats: int = 1) -> dict[str, Any]:
    """The fields of `ModelConfig` that a config.json determines.

    Args:
      hf: config.json; `share_embedding` and `layer_sharing` are options of the official MobileLLM.
      sharing: strategy or explicit plan that folds identical layers back into blocks; "" folds none.
      num_repeats: layers made of each block, with a strategy.

    Raises:
      UserError: another architecture, a missing or unsupported field, or a plan that does not fit.
    """
    kind, there = hf.get("model_type"), hf.get("architectures")
    known = _ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if known is None or there not in (None, [known]):
        valid = ", ".join(f"{kind!r} with {name}" for kind, name in _ARCHITECTURES.items())
        raise UserError(
            f"config.json: model_type={kind!r} with architectures={there!r} is not supported; valid: {valid}"
        )
    for name, valid in _ONLY.items():
        if hf.get(name) not in valid:
            only = "null" if valid == (None,) else f"{valid[0]!r}"
            raise UserError(f"config.json: {name}={hf[name]!r} is not supported; only {only} is")
    types = hf.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(t == "full_attention" for t in types)):
        raise UserError(f"config.json: layer_types={types!r} is not supported; only 'full_attention' is")
    width, heads = _integer(hf, "hidden_size"), _integer(hf, "num_attention_heads")
    kv_heads = heads if hf.get("num_key_value_heads") is None else _integer(hf, "num_key_value_heads")
    if hf.get("head_dim") is None and width % heads:
        raise UserError(
            f"config.json: num_attention_heads={heads} does not divide hidden_size={width}, and head_dim is "
            "missing"
        )
    return {
        "vocab_size": _integer(hf, "vocab_size"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": width // heads if hf.get("head_dim") is None else _integer(hf, "head_dim"),
        "ffn_kind": "swiglu",
        "ffn_width": _integer(hf, "intermediate_size"),
        "share_embedding": _flag(hf, "tie_word_embeddings") or _flag(hf, "share_embedding"),
        "rope_base": _rope_base(hf),
        "norm_epsilon": _number(hf, "rms_norm_eps"),
        "parameterization": "standard",
        **_sharing_fields(hf, sharing, num_repeats),
    }


def context_length(hf: Mapping[str, Any]) -> int:
    """Number of positions that the model was trained on."""
    return _integer(hf, "max_position_embeddings")


def check_exportable(config: ModelConfig) -> None:
    """Raises UserError if the model cannot be expressed as a Hugging Face Llama."""
    if config.ffn_kind != "swiglu":
        raise UserError(
            f"model.ffn_kind: {config.ffn_kind!r} cannot be exported as a Llama; only 'swiglu' can"
        )
    if config.width % config.num_heads:
        raise UserError(
            f"model.num_heads: {config.num_heads} does not divide model.width={config.width}, as "
            "transformers requires of a Llama; this run cannot be exported"
        )


def export_config(config: Config, dtype: str, special: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json.

    Args:
      config: of the run; its sequence length is the training context.
      dtype: of the weights, "float32", "bfloat16" or "float16".
      special: `bos_token_id` and `eos_token_id`.
    """
    m = config.model
    return {
        "architectures": [_ARCHITECTURES["llama"]],
        "model_type": "llama",
        "vocab_size": m.vocab_size,
        "hidden_size": m.width,
        "intermediate_size": m.ffn_width,
        "num_hidden_layers": m.effective_depth,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": m.norm_epsilon,
        "rope_theta": m.rope_base,  # read by transformers 4; 5 reads the next
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_base},
        "tie_word_embeddings": m.share_embedding,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **special,
    }


def _sharing_fields(hf: Mapping[str, Any], sharing: str, num_repeats: int) -> dict[str, Any]:
    layers = _integer(hf, "num_hidden_layers")
    if _flag(hf, "layer_sharing"):  # num_hidden_layers then counts blocks, each applied twice
        if sharing:
            raise UserError(
                f"--sharing={sharing}: layer_sharing in config.json is 'immediate' with 2 repeats already, "
                "so there are no copies to fold; omit the flag"
            )
        return {"depth": layers, "sharing": "immediate", "num_repeats": 2}
    sharing = sharing or "none"
    if sharing in STRATEGIES:
        if layers % num_repeats:
            raise UserError(f"--num_repeats={num_repeats}: does not divide num_hidden_layers={layers}")
        depth = layers // num_repeats
    else:  # an explicit plan; `layer_plan` refuses anything else
        depth = 1 + max((int(word) for word in sharing.split() if word.isdecimal()), default=0)
    plan = layer_plan(sharing, depth, num_repeats)
    if len(plan) != layers:
        raise UserError(
            f"--sharing={sharing!r}: the plan has {len(plan)} layers, but config.json has "
            f"num_hidden_layers={layers}; use a plan of {layers} layers"
        )
    return {"depth": depth, "sharing": sharing, "num_repeats": num_repeats}


def _rope_base(hf: Mapping[str, Any]) -> float:
    """The RoPE base from `rope_theta`, or from `rope_parameters` in newer files."""
    bases = set() if hf.get("rope_theta") is None else {_number(hf, "rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        values = {} if hf.get(name) is None else hf[name]
        plain = isinstance(values, dict) and set(values) <= _ROPE_FIELDS
        plain = plain and all(values.get(key) in ("default", None) for key in ("rope_type", "type"))
        if not plain or values.get("partial_rotary_factor") not in (1, None):
            raise UserError(f"config.json: {name}={values!r} is not supported; only rope_type 'default' is")
        if values.get("rope_theta") is not None:
            bases.add(_number(values, "rope_theta"))
    if len(bases) > 1:
        raise UserError(
            f"config.json: rope_theta has conflicting values: {' and '.join(map(str, sorted(bases)))}"
        )
    return bases.pop() if bases else 10_000.0  # as in transformers, for files older than the field


def _integer(hf: Mapping[str, Any], name: str) -> int:
    value = hf.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"config.json: {name}={value!r} is not valid; expected an integer of at least 1")
    return value


def _number(hf: Mapping[str, Any], name: str) -> float:
    value: Any = hf.get(name)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"config.json: {name}={value!r} is not valid; expected a positive number")
    return float(value)


def _flag(hf: Mapping[str, Any], name: str) -> bool:
    value = hf.get(name)
    if value not in (None, False, True):
        raise UserError(f"config.json: {name}={value!r} is not valid; expected true or false")
    return bool(value)
