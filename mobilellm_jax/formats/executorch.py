"""Export of a run to ExecuTorch, by its exporter of language models, `export_llm`.

The program (.pte) has a key/value cache inside, and products by XNNPACK. Weights are named by their content,
so those of a shared block are stored once. The exporter takes a checkpoint with Meta's names; it is made from
a Hugging Face folder.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from mobilellm_jax.config import Config
from mobilellm_jax.formats import tools
from mobilellm_jax.formats.huggingface_weights import WEIGHTS
from mobilellm_jax.formats.parity import Parity, compare, our_logits, random_ids
from mobilellm_jax.storage.files import new_directory

TYPES = ("f32",)
PROGRAM = "model.pte"
# As for GGUF. Sums have another order: 1.6e-6 of the largest logit for two blocks of MobileLLM-125M.
BOUND = 1e-4
_EXPORTER = "executorch.extension.llm.export.export_llm"
_NAMES = {
    r"model\.embed_tokens": "tok_embeddings",
    r"lm_head": "output",
    r"model\.norm": "norm",
    r"model\.layers\.(\d+)\.input_layernorm": r"layers.\1.attention_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"layers.\1.ffn_norm",
    r"model\.layers\.(\d+)\.self_attn\.(\w)_proj": r"layers.\1.attention.w\2",
    r"model\.layers\.(\d+)\.mlp\.gate_proj": r"layers.\1.feed_forward.w1",
    r"model\.layers\.(\d+)\.mlp\.down_proj": r"layers.\1.feed_forward.w2",
    r"model\.layers\.(\d+)\.mlp\.up_proj": r"layers.\1.feed_forward.w3",
}


def export_run(workdir: Path, out: Path, kind: str) -> tools.Exported:
    """Exports a trained or imported run to a folder: the program, and the files of the tokenizer.

    Args:
      workdir: the run.
      out: the folder to create.
      kind: of the weights, one of `TYPES`.

    Raises:
      UserError: the extra is not installed, there is no intact run, the exporter cannot take the model, or
        `out` exists or cannot be written.
      ParityError: ExecuTorch computes something else. There is no folder then.
    """
    assert kind in TYPES, kind
    tools.require("executorch", "executorch", "torch")
    with new_directory("out", out) as directory:
        run = tools.open_exportable(workdir, "executorch")
        _build(run, directory)
        found = _parity(directory / PROGRAM, run)
    return tools.Exported(run.original, run.tokenizer, found)


def _build(run: tools.Run, directory: Path) -> None:
    """Makes the files of a folder."""
    with tempfile.TemporaryDirectory(prefix=".et-", dir=directory.parent) as temporary:
        here = Path(temporary)
        run.write_folder(here / "hf")
        _write_checkpoint(here / "hf", here / "checkpoint.pth")
        (here / "params.json").write_text(json.dumps(_shape(run.config)))
        (here / "export.yaml").write_text(json.dumps(_settings(run)))
        # The exporter writes into the current folder, whatever its `output_dir` says. It quantizes if the
        # path of the checkpoint has "int8" or "8da4w" in it: so all names are relative.
        tools.convert("executorch", here, "-m", _EXPORTER, "--config", "export.yaml")
        shutil.move(here / PROGRAM, directory)
        for path in (here / "hf").iterdir():
            if path.name not in (WEIGHTS, "config.json"):
                shutil.move(path, directory)


def _write_checkpoint(folder: Path, path: Path) -> None:
    """Writes the weights of a folder under Meta's names; the head is written out even if it is tied."""
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    there = load_file(folder / WEIGHTS)
    renamed = {_meta_name(name.removesuffix(".weight")): tensor for name, tensor in there.items()}
    renamed.setdefault("output", renamed["tok_embeddings"])
    torch.save({f"{name}.weight": tensor for name, tensor in renamed.items()}, path)


def _meta_name(name: str) -> str:
    """Meta's name of a tensor of Hugging Face."""
    for pattern, meta in _NAMES.items():
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(meta)
    raise AssertionError(f"{name}: not a tensor of a Llama")


def _shape(config: Config) -> dict[str, Any]:
    m = config.model
    return {
        "dim": m.width,
        "hidden_dim": m.ffn_width,
        "n_layers": m.effective_depth,
        "n_heads": m.num_heads,
        "n_kv_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "vocab_size": m.vocab_size,
        "norm_eps": m.norm_epsilon,
        "rope_theta": m.rope_base,
        "use_hf_rope": True,  # dimensions i and i + H/2 of a head are a pair
    }


def _settings(run: tools.Run) -> dict[str, Any]:
    context, tokenizer = run.config.data.sequence_length, run.tokenizer
    special = {"get_bos_id": tokenizer.bos_id, "get_eos_ids": tokenizer.eos_id and [tokenizer.eos_id]}
    known = {name: value for name, value in special.items() if value is not None}
    return {
        "base": {
            "model_class": "llama3",
            "checkpoint": "checkpoint.pth",
            "params": "params.json",
            "metadata": json.dumps(known),
        },
        "model": {"use_kv_cache": True, "use_sdpa_with_kv_cache": True},
        "export": {"max_seq_length": context, "max_context_length": context, "output_name": PROGRAM},
        "backend": {"xnnpack": {"enabled": True, "extended_ops": True}},
    }


class Model:
    """A program in ExecuTorch's runtime."""

    def __init__(self, path: Path) -> None:
        """Loads a program; UserError if ExecuTorch is not installed."""
        tools.require("executorch", "executorch", "torch")
        # Attention with a cache is an operator that this import registers.
        from executorch.extension.llm.custom_ops import (  # pyright: ignore[reportMissingImports]
            custom_ops,  # noqa: F401
        )
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        self._program = Runtime.get().load_program(path)
        self._forward = self._program.load_method("forward")
        self._position = 0

    def extend(self, ids: Sequence[int]) -> Float32[np.ndarray, " V"]:
        """Reads more of the text; returns the logits after the last of its ids."""
        import torch  # pyright: ignore[reportMissingImports]

        assert self._forward is not None
        position = torch.tensor([self._position], dtype=torch.long)
        (logits,) = self._forward.execute((torch.tensor([list(ids)], dtype=torch.long), position))
        self._position += len(ids)
        return logits.numpy().reshape(-1).copy()


def _parity(path: Path, run: tools.Run) -> Parity:
    """Compares logits: after a prompt, and then token by token, with keys and values from the cache."""
    ids = random_ids(run.config)
    prompt = max(1, len(ids) // 2)
    ours_TV = our_logits(run.params, run.config.model, ids)[prompt - 1 :]
    there = Model(path)
    theirs = [there.extend(ids[:prompt]), *(there.extend([token]) for token in ids[prompt:])]
    return compare("ExecuTorch", np.stack(theirs), ours_TV, ours_TV, BOUND)
