"""Export of a run to ONNX, by the model builder of ONNX Runtime GenAI.

The builder makes the graph of a Llama from a Hugging Face folder, with a key/value cache. A shared block is a
layer for each time it is applied there. Its initializers are equal, so they are stored once and named by
several nodes: the file of a model with layer sharing is as large as its blocks.

With few bits, the weights of matrices have a float32 scale for each `GROUP` inputs of an output. The
embedding has 4 bits with int4 if it is the head as well, else it is float32: ONNX Runtime looks up rows of
no other type.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from mobilellm_jax import model
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import tools
from mobilellm_jax.formats.huggingface_weights import places, tensors
from mobilellm_jax.formats.onnx_runtime import Model
from mobilellm_jax.formats.parity import Parity, compare, difference, expanded, our_logits, random_ids
from mobilellm_jax.storage.files import new_directory

TYPES = {"f32": "fp32", "int8": "int8", "int4": "int4"}  # and the builder's word
GROUP = 32
# Largest difference of two logits, over the largest logit, as for GGUF: sums have another order.
BOUND = 1e-4
# With few bits, activations are rounded to 8 bits before a product, which makes 1e-2 in trained models and
# 0.13 in a random one with weights up to 0.5. Tensors in another place make about 1.
_ROUNDED_BOUND = 0.3
_EXACT = "exact.onnx"  # a graph that does not round activations, in the folder while it is compared
_BUILDER = "onnxruntime_genai.models.builder"
_PACKAGES = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers")
_HEADS = 16  # a multiple that GroupQueryAttention of ONNX Runtime wants


def export_run(workdir: Path, out: Path, kind: str) -> tools.Exported:
    """Exports a trained or imported run to a folder, and compares what ONNX Runtime makes of it with the run.

    Args:
      workdir: the run.
      out: the folder to create.
      kind: of the weights, one of `TYPES`.

    Raises:
      UserError: the extra is not installed, there is no intact run, the builder or ONNX Runtime cannot take
        the model, or `out` exists or cannot be written.
      ParityError: ONNX Runtime computes something else. There is no folder then.
    """
    check_installed()
    with new_directory("out", out) as directory:
        run = tools.open_exportable(workdir, "onnx")
        check_exportable(run.config.model)
        build(run, directory, kind)
        found = _parity(directory, run.params, run.config, kind)
    return tools.Exported(run.original, run.tokenizer, found)


def check_installed() -> None:
    """Raises UserError with the install line if the extra is not installed."""
    tools.require("onnx", *_PACKAGES)


def check_exportable(config: ModelConfig) -> None:
    """Raises UserError for shapes that the builder gets wrong without a word, or ONNX Runtime cannot run."""
    m = config
    sizes = {
        "model.width": m.width,
        "model.ffn_width": m.ffn_width,
        "model.num_heads * model.head_dim": m.num_heads * m.head_dim,
        "model.num_kv_heads * model.head_dim": m.num_kv_heads * m.head_dim,
    }
    tools.check_sizes("onnx", m, sizes, "so that the builder takes a layer of a block for the head")
    if m.head_dim % _HEADS:
        below, above = m.head_dim // _HEADS * _HEADS, -(-m.head_dim // _HEADS) * _HEADS
        fits = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"--format=onnx: model.head_dim={m.head_dim}, but ONNX Runtime takes multiples of {_HEADS} "
            f"({fits} would fit); use --format=gguf"
        )


def build(run: tools.Run, directory: Path, kind: str) -> None:
    """Makes the files of a folder: the graph, its weights with each block once, settings and tokenizer."""
    with tempfile.TemporaryDirectory(prefix=".hf-", dir=directory.parent) as temporary:
        folder, built = Path(temporary, "hf"), Path(temporary, "onnx")
        run.write_folder(folder)
        flags = {"-i": folder, "-o": built, "-p": TYPES[kind], "-e": "cpu", "-c": Path(temporary, "cache")}
        words = [str(word) for flag in flags.items() for word in flag]
        tools.convert("onnx", Path(temporary), "-m", _BUILDER, *words)
        for path in built.iterdir():
            if path.suffix not in (".onnx", ".data"):
                shutil.move(path, directory)
        _store_once(built / "model.onnx", directory / "model.onnx")


def _store_once(source: Path, target: Path) -> None:
    """Copies a graph with its weights; equal ones are stored once, and all nodes name the same."""
    import onnx_ir as ir  # pyright: ignore[reportMissingImports]
    from onnx_ir.passes.common import DeduplicateHashedInitializersPass  # pyright: ignore[reportMissingImports]

    graph = DeduplicateHashedInitializersPass()(ir.load(source)).model
    ir.save(graph, target, external_data=f"{target.name}.data", size_threshold_bytes=0)


# --- comparison ---------------------------------------------------------------------------------------------


def _parity(directory: Path, params: model.Params, config: Config, kind: str) -> Parity:
    """Compares logits: of a prompt, and then token by token, with keys and values from the cache.

    With few bits, this is done without the rounding of activations, and what that changes is part of
    `rounding`.
    """
    m, ids = config.model, random_ids(config)
    full_TV = our_logits(params, m, ids)
    theirs_TV = _logits(directory, "model.onnx", ids)
    if kind == "f32":
        return compare("ONNX Runtime", theirs_TV, full_TV, full_TV, BOUND)
    unshared, rounded = _rounded(directory / "model.onnx", params, m)
    ours_TV = our_logits(rounded, unshared, ids)
    compare("ONNX Runtime", theirs_TV, ours_TV, full_TV, _ROUNDED_BOUND)
    _write_exact(directory)
    found = compare("ONNX Runtime", _logits(directory, _EXACT, ids), ours_TV, full_TV, BOUND)
    (directory / _EXACT).unlink()
    return found._replace(rounding=difference(theirs_TV, full_TV))


def _logits(directory: Path, graph: str, ids: list[int]) -> Float32[np.ndarray, "T V"]:
    there, prompt = Model(directory, graph=graph), max(1, len(ids) // 2)
    return np.concatenate([there.start(ids[:prompt]), *(there.extend([token]) for token in ids[prompt:])])


def _write_exact(directory: Path) -> None:
    """Writes a graph beside that of a folder, with the same weights, which does not round activations."""
    import onnx_ir as ir  # pyright: ignore[reportMissingImports]

    graph = ir.load(directory / "model.onnx")
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)  # float32
    ir.save(graph, directory / _EXACT)


def _rounded(path: Path, params: model.Params, config: ModelConfig) -> tuple[ModelConfig, model.Params]:
    """The model with the weights of a graph: a block for each layer, and a head of its own."""
    there = _read_matrices(path, config)
    unshared, rounded = expanded(config, share_embedding=False)
    into = places(unshared, unshared.plan)
    for name, tensor in {**dict(tensors(params, config)), **there}.items():
        leaf = into[name].leaf(rounded)
        leaf[...] = into[name].read(tensor, leaf)
    return unshared, rounded


def _read_matrices(path: Path, config: ModelConfig) -> dict[str, Float32[np.ndarray, "O I"]]:
    """The matrices of few bits in a graph, by their names in a Hugging Face folder."""
    import onnx_ir as ir  # pyright: ignore[reportMissingImports]

    heads = [config.num_heads * config.head_dim, (config.num_heads + config.num_kv_heads) * config.head_dim]
    found, nodes = {}, list(ir.load(path).graph)
    for node in nodes:
        if node.op_type != "MatMulNBits":
            continue
        w_OI = _dequantize(node)
        layer = re.fullmatch(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)_proj/MatMul\w*", str(node.name))
        if layer is None:
            found["lm_head.weight"] = w_OI
            continue
        number, part, which = layer.groups()
        parts = dict(zip("qkv", np.split(w_OI, heads), strict=True)) if which == "qkv" else {which: w_OI}
        group = {"attn": "self_attn", "mlp": "mlp"}[part]
        found |= {f"model.layers.{number}.{group}.{x}_proj.weight": w for x, w in parts.items()}
    if any(node.op_type == "GatherBlockQuantized" for node in nodes):  # which looks up rows of the head
        found["model.embed_tokens.weight"] = found["lm_head.weight"]
    return found


def _dequantize(node: Any) -> Float32[np.ndarray, "O I"]:
    """The weights of a MatMulNBits without zero points: unsigned integers, whose middle stands for 0."""
    _, packed, scales = (value and value.const_value for value in node.inputs[:3])
    bits, inputs, outputs = (node.attributes[name].as_int() for name in ("bits", "K", "N"))
    q = packed.numpy().reshape(outputs, -1, GROUP * bits // 8)
    if bits == 4:  # the first of two numbers is in the low bits
        q = np.stack([q & 15, q >> 4], -1)
    q = q.reshape(outputs, -1, GROUP).astype(np.float32) - 2 ** (bits - 1)
    return (q * scales.numpy().reshape(outputs, -1, 1)).reshape(outputs, -1)[:, :inputs]
