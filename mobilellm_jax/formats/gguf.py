"""Export of a run to a GGUF file, the format of llama.cpp, by the `gguf` package alone.

The file holds a Llama, the tensors of Hugging Face's (`huggingface_weights.py`) under other names. Rows of
queries and keys are permuted, as llama.cpp rotates the dimensions 2i and 2i + 1 of a head, and we i and
i + H/2. GGUF cannot share tensors: a block is written once for each time it is applied. Matrices and
embeddings may have few bits, with a scale for each group of 32 numbers of a row; norm gains stay float32.
"""

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mobilellm_jax import model
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import llama_cpp
from mobilellm_jax.formats.gguf_parity import parity
from mobilellm_jax.formats.gguf_tokenizer import Vocabulary, chat_template, vocabulary
from mobilellm_jax.formats.huggingface_weights import Place, check_values, places, tensors
from mobilellm_jax.formats.parity import Parity, expanded
from mobilellm_jax.model.uses import as_blocks
from mobilellm_jax.runs.directory import TOKENIZER, begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.storage.files import new_file

GROUP = 32  # numbers of a row that share a scale
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_GROUPED = ("q8_0", "q4_0")
_INSTALL = "python -m pip install -e '.[gguf]'"
_PERMUTED = {"blocks/attention/query": "num_heads", "blocks/attention/key": "num_kv_heads"}


class Words(NamedTuple):
    """What a file says about text: the tokenizer, its marks, and how a conversation is written."""

    vocabulary: Vocabulary
    bos_id: int
    eos_id: int
    add_bos: bool
    chat_template: str | None


class Exported(NamedTuple):
    """What was written.

    Attributes:
      config: of the run.
      tokenizer: the run's; None if it keeps none.
      kinds: the type of every tensor, by its name in the file.
      parity: comparison with llama.cpp; None where that is not installed.
    """

    config: Config
    tokenizer: Tokenizer | None
    kinds: Mapping[str, str]
    parity: Parity | None


def export_run(workdir: Path, out: Path, kind: str, mixed: bool = False) -> Exported:
    """Exports a trained or imported run, and compares the file with the run where llama.cpp is installed.

    Args:
      workdir: the run.
      out: the file to create.
      kind: of the weights, one of `TYPES`.
      mixed: keep tensors whose rows are no whole groups in f16, instead of refusing them.

    Raises:
      UserError: gguf is not installed; there is no intact run; llama.cpp cannot hold the model, its weights
        or its tokenizer; or `out` exists or cannot be written.
      ParityError: llama.cpp loads the file and computes something else. There is no file then.
    """
    _package()
    with new_file("out", out) as path:
        config, params = open_run(workdir)
        check_exportable(config.model, kind, mixed)
        params, m = as_blocks(params, config.model, "--format=gguf")
        held = dataclasses.replace(config, model=m)
        tokenizer = open_tokenizer(workdir)
        words = None if tokenizer is None else _words(tokenizer, config.model, workdir)
        kinds = write(path, held, params, kind, mixed, words, workdir.absolute().name)
        found = None
        if llama_cpp.installed():
            rounded = _rounded(params, m, kinds)
            add_bos = words is not None and words.add_bos
            found = parity(path, params, held, kind, rounded, tokenizer, add_bos)
    return Exported(config, tokenizer, kinds, found)


def write(
    path: Path,
    config: Config,
    params: model.Params,
    kind: str,
    mixed: bool = False,
    words: Words | None = None,
    name: str = "",
) -> dict[str, str]:
    """Writes a file; returns the type of every tensor, by its name there.

    Args:
      path: the file to write.
      config, params: of a run, float32.
      kind, mixed: as in `export_run`.
      words: the tokenizer; without one, llama.cpp takes and gives token ids only.
      name: of the model.

    Raises:
      UserError: llama.cpp cannot hold the model or its weights.
    """
    gguf, m = _package(), config.model
    check_exportable(m, kind, mixed)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(gguf, writer, config, name, kind)
    _add_words(writer, words)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, m.effective_depth)
    kinds = {
        names.get_name(name, (".weight",)): _kind(place, kind, mixed) for name, place in _places(m).items()
    }
    with contextlib.closing(writer):
        _write(gguf, writer, params, m, kinds)
    return kinds


def check_exportable(config: ModelConfig, kind: str, mixed: bool = False) -> None:
    """Raises UserError if llama.cpp cannot hold the model in a type: the rows have to be whole groups."""
    if config.ffn_kind != "swiglu":
        raise UserError(
            f"model.ffn_kind: {config.ffn_kind!r} cannot be exported as a Llama; only 'swiglu' can"
        )
    if kind not in _GROUPED or mixed:
        return
    rows = {
        "model.width": (config.width, ""),
        "model.ffn_width": (config.ffn_width, ""),
        "model.num_heads": (config.num_heads * config.head_dim, f" of model.head_dim={config.head_dim}"),
    }
    wrong = []
    for name, (length, rest) in rows.items():
        if length % GROUP:
            below, above = length // GROUP * GROUP, -(-length // GROUP) * GROUP
            fits = f"{below} or {above}" if below else f"{above}"
            value = getattr(config, name.removeprefix("model."))
            wrong.append(f"{name}={value}{rest} makes rows of {length} ({fits} would fit)")
    if wrong:
        raise UserError(
            f"--type={kind}: takes rows of whole groups of {GROUP} numbers, but {'; '.join(wrong)}; use "
            "--type=f16, or --mixed to keep the tensors with these rows in f16"
        )


def _package() -> ModuleType:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--format=gguf: needs the gguf package; install it with {_INSTALL}")
    import gguf

    return gguf


# --- metadata -----------------------------------------------------------------------------------------------


def _describe(gguf: Any, writer: Any, config: Config, name: str, kind: str) -> None:
    """Adds the keys of a Llama: its shape, its context and its type."""
    m = config.model
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(m.vocab_size)
    writer.add_context_length(config.data.sequence_length)
    writer.add_embedding_length(m.width)
    writer.add_block_count(m.effective_depth)
    writer.add_feed_forward_length(m.ffn_width)
    writer.add_head_count(m.num_heads)
    writer.add_head_count_kv(m.num_kv_heads)
    writer.add_key_length(m.head_dim)
    writer.add_value_length(m.head_dim)
    writer.add_layer_norm_rms_eps(m.norm_epsilon)
    writer.add_rope_freq_base(m.rope_base)
    writer.add_rope_dimension_count(m.head_dim)


def _words(tokenizer: Tokenizer, config: ModelConfig, workdir: Path) -> Words:
    """What is known of text in a run. Without BOS, EOS is named for it, as in GPT-2, and is not added."""
    known = vocabulary(tokenizer, config.vocab_size)
    eos_id = tokenizer.eos_id
    assert eos_id is not None  # `vocabulary` refuses it
    bos_id = eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    add_bos = begins_with_bos(workdir, tokenizer)
    return Words(known, bos_id, eos_id, add_bos, chat_template(workdir / TOKENIZER))


def _add_words(writer: Any, words: Words | None) -> None:
    """Adds the keys of the tokenizer."""
    if words is None:
        writer.add_tokenizer_model("no_vocab")
        return
    known = words.vocabulary
    writer.add_tokenizer_model(known.model)
    writer.add_tokenizer_pre(known.pre)
    writer.add_token_list(known.tokens)
    writer.add_token_types(known.types)
    if known.scores:
        writer.add_token_scores(known.scores)
        writer.add_unk_token_id(known.unknown)
        writer.add_add_space_prefix(known.adds_space)
    else:
        writer.add_token_merges(known.merges)
    writer.add_bos_token_id(words.bos_id)
    writer.add_eos_token_id(words.eos_id)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(False)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


# --- tensors ------------------------------------------------------------------------------------------------


def _places(config: ModelConfig) -> dict[str, Place]:
    return places(config, config.plan)


def _kind(place: Place, kind: str, mixed: bool) -> str:
    if place.parameter.is_gain:
        return "f32"
    return "f16" if mixed and kind in _GROUPED and place.shape[-1] % GROUP else kind


def _write(
    gguf: Any, writer: Any, params: model.Params, config: ModelConfig, kinds: Mapping[str, str]
) -> None:
    """Writes a file tensor by tensor, so that no second copy of the model is in memory."""
    for (name, kind), place in zip(kinds.items(), _places(config).values(), strict=True):
        of = gguf.GGMLQuantizationType[kind.upper()]
        size, stored = gguf.GGML_QUANT_SIZES[of]
        writer.add_tensor_info(
            name, place.shape, np.dtype(np.float32), math.prod(place.shape) // size * stored, of
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, place, kind, tensor in _tensors(params, config, kinds):
        check_values(name, tensor)
        coded = _quantize(gguf, name, _permute(tensor, place, config), kind)
        writer.write_tensor_data(np.ascontiguousarray(coded))


def _tensors(
    params: model.Params, config: ModelConfig, kinds: Mapping[str, str]
) -> Iterator[tuple[str, Place, str, np.ndarray]]:
    """Yields name in the file, place, type and float32 values of all tensors."""
    rows = zip(tensors(params, config), _places(config).values(), kinds.items(), strict=True)
    for (_, tensor), place, (name, kind) in rows:
        yield name, place, kind, tensor


def _permute(tensor: np.ndarray, place: Place, config: ModelConfig) -> np.ndarray:
    """The rows of a matrix in llama.cpp's order: pairs i, i + H/2 of a head become neighbours."""
    if place.parameter.path not in _PERMUTED:
        return tensor
    heads = getattr(config, _PERMUTED[place.parameter.path])
    return tensor.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(place.shape)


def _quantize(gguf: Any, name: str, tensor: np.ndarray, kind: str) -> np.ndarray:
    """The numbers of a tensor as the file holds them.

    Raises:
      UserError: a weight is too large for the type; the scales of groups are f16.
    """
    of = gguf.GGMLQuantizationType[kind.upper()]
    with np.errstate(over="ignore", invalid="ignore"):
        coded = gguf.quantize(tensor, of)
        if not np.isfinite(gguf.dequantize(coded, of)).all():
            raise UserError(
                f"--type={kind}: {name} has weights that are too large for it; use --type=f32 or bf16"
            )
    return coded


def _rounded(params: model.Params, config: ModelConfig, kinds: Mapping[str, str]) -> model.Params | None:
    """Parameters of the `expanded` model with the weights of the file; None if all are float32."""
    if set(kinds.values()) == {"f32"}:
        return None
    gguf = _package()
    unshared, rounded = expanded(config)
    there = places(unshared, unshared.plan).values()
    for (name, _, kind, tensor), place in zip(_tensors(params, config, kinds), there, strict=True):
        of = gguf.GGMLQuantizationType[kind.upper()]
        leaf = place.leaf(rounded)
        leaf[...] = place.read(gguf.dequantize(_quantize(gguf, name, tensor, kind), of), leaf)
    return rounded
