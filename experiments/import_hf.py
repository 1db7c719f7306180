"""Import a Llama from Hugging Face: MobileLLM, SmolLM, TinyLlama, ... become a run directory.

  python -m experiments.import_hf --source=HuggingFaceTB/SmolLM2-135M --workdir=runs/smollm2
  python -m experiments.import_hf --source=exported --workdir=runs/back --sharing=immediate --num_repeats=2

The source is a folder with config.json and safetensors, or an id on the hub, which is downloaded. Weights
become float32, exactly. With --sharing, layers that are copies of each other are folded into blocks again; it
is checked that they are copies. The directory has weights but no optimizer state: it cannot be trained on.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
from absl import flags
from huggingface_hub import snapshot_download

from configs import base
from experiments import cli
from mobilellm_jax import data, huggingface
from mobilellm_jax.checkpoint import Checkpoints
from mobilellm_jax.config import Config, from_config_dict, to_dict
from mobilellm_jax.data.tokenizers import open_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface_config import context_length, model_fields, read_object
from mobilellm_jax.run import IMPORTED, TOKENIZER

_SOURCE = flags.DEFINE_string("source", None, "folder with config.json and safetensors, or <owner>/<name>")
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory to make")
_SHARING = flags.DEFINE_string("sharing", "", "fold copied layers: a sharing strategy or explicit plan")
_NUM_REPEATS = flags.DEFINE_integer("num_repeats", 1, "copies of each block, with a strategy", 1)

_TOKENIZER_SPECS = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}  # first choice first
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_HUB_ID = r"[\w.-]+/[\w.-]+"


def main() -> int:
    """Imports, and returns the exit status."""
    if not _SOURCE.value:
        raise UserError("--source: say what to import, a folder or an id such as HuggingFaceTB/SmolLM2-135M")
    with cli.new_directory("workdir", _WORKDIR.value) as workdir:
        folder = _fetch(_SOURCE.value, ["config.json"])
        hf = read_object(folder / "config.json")
        fields = model_fields(hf, _SHARING.value, _NUM_REPEATS.value)
        folder = _fetch(
            _SOURCE.value, ["*.safetensors", "*.safetensors.index.json", *_TOKENIZER_SPECS, *_BESIDE]
        )
        config = _config(fields, hf, _copy_tokenizer(folder, fields["vocab_size"], workdir))
        params = huggingface.read_params(folder, config.model)
        checkpoints = Checkpoints(workdir / "checkpoints")
        checkpoints.save(0, {"params": params}, None)
        checkpoints.close()
        _write(workdir / "config.json", to_dict(config))
        _write(workdir / IMPORTED, {"source": _SOURCE.value, "command": cli.command(), "config": hf})
    m = config.model
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokenizer = config.data.tokenizer if config.data.source.startswith("files:") else "none"
    print(
        f"imported {count:,} parameters, {m.depth} blocks of width {m.width} in {m.effective_depth} layers; "
        f"tokenizer: {tokenizer}; see {_WORKDIR.value}"
    )
    return 0


def _fetch(source: str, patterns: list[str]) -> Path:
    """Returns the folder that `source` names, after downloading these files of it if it is on the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(_HUB_ID, source):
        raise UserError(
            f"--source={source}: there is no such folder, and it is no id on the hub, <owner>/<name>"
        )
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the library lets those of several HTTP libraries through
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"--source={source}: there is no such folder, and the hub says: {reason}") from None


def _copy_tokenizer(folder: Path, vocab_size: int, workdir: Path) -> str | None:
    """Copies the tokenizer, if there is one, and returns the kind and name of its file.

    Raises:
      UserError: it cannot be read, or has ids that the model does not have.
    """
    name = next((name for name in _TOKENIZER_SPECS if (folder / name).is_file()), None)
    if name is None:
        return None
    tokenizer = open_tokenizer(f"{_TOKENIZER_SPECS[name]}:{folder / name}")
    assert tokenizer is not None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder / name}: has ids up to {tokenizer.vocab_size - 1}, and config.json says "
            f"vocab_size={vocab_size}"
        )
    data.save_tokenizer(tokenizer, workdir / TOKENIZER)
    for beside in _BESIDE:
        if (folder / beside).is_file():
            shutil.copy(folder / beside, workdir / TOKENIZER)
    return tokenizer.spec


def _config(fields: dict[str, Any], hf: dict[str, Any], tokenizer: str | None) -> Config:
    """Returns the config of the run: what the model is; for what trained it, the defaults stand."""
    config = base.get_config()
    base.update(config, {f"model.{name}": value for name, value in fields.items()})
    config.data.sequence_length = context_length(hf)
    config.data.source = "files:unknown" if tokenizer else "tokens:unknown"
    if tokenizer:
        kind, _, name = tokenizer.partition(":")
        config.data.tokenizer = f"{kind}:{Path(_WORKDIR.value) / TOKENIZER / name}"
    return from_config_dict(config)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
