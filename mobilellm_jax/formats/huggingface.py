"""Conversion between Hugging Face folders of the Llama architecture and run directories.

`huggingface_weights.py` converts tensors, `huggingface_config.py` config.json. PyTorch is not needed.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from ml_collections import ConfigDict

from mobilellm_jax import model
from mobilellm_jax.config import Config, from_config_dict, to_dict
from mobilellm_jax.data.tokenizers import (
    CARD_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    open_tokenizer,
    save_tokenizer,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.huggingface_config import (
    check_exportable,
    context_length,
    export_config,
    model_fields,
    read_object,
)
from mobilellm_jax.formats.huggingface_weights import INDEX, WEIGHTS, read_params, write_params
from mobilellm_jax.model.uses import as_blocks
from mobilellm_jax.runs.directory import IMPORTED, TOKENIZER, begins_with_bos
from mobilellm_jax.runs.directory import open_tokenizer as read_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.storage.checkpoint import save_params
from mobilellm_jax.storage.files import new_directory
from mobilellm_jax.storage.sealed import seal

_SPECS = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}  # the first that is there
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
FILES = ("config.json", WEIGHTS, INDEX, "*.safetensors", *_SPECS, *_BESIDE)  # that import reads


def import_run(
    folder: Path, workdir: Path, defaults: ConfigDict, sharing: str = "", num_repeats: int = 1
) -> Config:
    """Creates a run directory from a folder with config.json and safetensors; returns the run's config.

    The run has float32 weights but no optimizer state: it can be opened, and another run can start from it.

    Args:
      folder: the model to import; a tokenizer.json or tokenizer.model in it is copied.
      workdir: the directory to create.
      defaults: values of all fields that the folder does not determine.
      sharing: strategy or explicit plan that folds identical layers back into blocks; "" folds none.
      num_repeats: layers made of each block, with a strategy.

    Raises:
      UserError: the folder is corrupt or of another architecture, or `workdir` exists or is not writable.
    """
    with new_directory("workdir", workdir) as directory:
        hf = read_object(folder / "config.json")
        fields = model_fields(hf, sharing, num_repeats)
        spec = _copy_tokenizer(folder, fields["vocab_size"], directory)
        config = _config(defaults, fields, context_length(hf), spec, workdir)
        # The official MobileLLM keeps one layer for each block; everybody else one for each layer applied.
        layers = tuple(range(config.model.depth)) if hf.get("layer_sharing") else config.model.plan
        params = read_params(folder, config.model, layers)
        save_params(directory / "checkpoints" / "0", params)
        _write_json(directory / IMPORTED, {"source": folder.name, "config": hf})
        _write_json(directory / "config.json", seal(to_dict(config)))
    return config


def export_run(workdir: Path, target: Path, dtype: str) -> Config:
    """Exports a trained or imported run to a folder that transformers loads; returns the run's config.

    Args:
      workdir: the run.
      target: the folder to create.
      dtype: of the weights, one of `huggingface_weights.DTYPES`.

    Raises:
      UserError: there is no intact run, it is not a Llama, or `target` exists or is not writable.
    """
    with new_directory("out", target) as directory:
        config, params = open_run(workdir)
        check_exportable(config.model)
        params, m = as_blocks(params, config.model, "--format=hf")
        write_folder(directory, workdir, dataclasses.replace(config, model=m), params, dtype)
    return config


def write_folder(directory: Path, workdir: Path, config: Config, params: model.Params, dtype: str) -> None:
    """Writes a folder that transformers loads.

    Args:
      directory: an empty one.
      workdir: the run, for its tokenizer.
      config, params: of the run, as `check_exportable` and `as_blocks` leave them.
      dtype: of the weights, one of `huggingface_weights.DTYPES`.

    Raises:
      UserError: a weight is too large for `dtype`, or files of the run cannot be read.
    """
    tokenizer = read_tokenizer(workdir)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos")}
    if (workdir / IMPORTED).exists():
        hf = read_object(workdir / IMPORTED)["config"]
        special = {name: hf.get(name) for name in special}
    if tokenizer is not None:
        _write_tokenizer(directory, tokenizer, workdir)
    _write_json(directory / "config.json", export_config(config, dtype, special))
    write_params(directory / WEIGHTS, params, config.model, dtype)


def _copy_tokenizer(folder: Path, vocab_size: int, workdir: Path) -> str | None:
    """Copies the tokenizer and returns the kind and name of its file; None if there is none.

    Raises:
      UserError: it cannot be read, or has ids outside the vocabulary of the model.
    """
    specs = [f"{kind}:{folder / name}" for name, kind in _SPECS.items() if (folder / name).is_file()]
    tokenizer = open_tokenizer(specs[0]) if specs else None
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{specs[0]}: has ids up to {tokenizer.vocab_size - 1}, but config.json has "
            f"vocab_size={vocab_size}; use the tokenizer of this model"
        )
    save_tokenizer(tokenizer, workdir / TOKENIZER)
    for beside in _BESIDE:
        if (folder / beside).is_file():
            shutil.copy(folder / beside, workdir / TOKENIZER)
    return tokenizer.spec


def _config(
    defaults: ConfigDict, fields: dict[str, Any], context: int, spec: str | None, workdir: Path
) -> Config:
    """The config of an imported run, whose training data are unknown."""
    values = defaults.to_dict()
    values["model"] |= fields
    values["data"] |= {"sequence_length": context, "source": "imported"}
    if spec:
        kind, _, name = spec.partition(":")
        values["data"]["tokenizer"] = f"{kind}:{workdir / TOKENIZER / name}"
    return from_config_dict(values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _write_tokenizer(target: Path, tokenizer: Tokenizer, workdir: Path) -> None:
    """Writes the files with which `AutoTokenizer` gives the ids that the model expects.

    Imported files are copied unchanged. For a trained run, texts begin with BOS, as in training.
    """
    for path in (workdir / TOKENIZER).iterdir():
        if path.name != CARD_FILE:
            shutil.copy(path, target)
    special = tokenizer.bos_id, tokenizer.eos_id
    if isinstance(tokenizer, SentencePieceTokenizer):
        piece = tokenizer.piece
    else:
        theirs = tokenizers.Tokenizer.from_str(tokenizer.file_bytes.decode() or bytes_tokenizer())
        piece = theirs.id_to_token
        if not (workdir / IMPORTED).exists():
            _put_before(theirs, tokenizer.bos_id)
            (target / "tokenizer.json").write_text(theirs.to_str(pretty=True))
    path = target / "tokenizer_config.json"
    if not path.exists():
        bos, eos = (None if i is None else piece(i) for i in special)
        # With SentencePiece, LlamaTokenizer gives other tokens for several spaces in a row, and so does this
        # class without `legacy` (measured with transformers 5.24). `add_bos_token` has an effect with
        # SentencePiece alone; elsewhere tokenizer.json decides.
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "legacy": True,
            "add_bos_token": begins_with_bos(workdir, tokenizer),
            "bos_token": bos,
            "eos_token": eos,
        }
        path.write_text(json.dumps(values, indent=1) + "\n")


def _put_before(tokenizer: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Sets a tokenizer to add BOS, if any, and nothing else, with no truncation or padding."""
    bos = [] if bos_id is None else [tokenizer.id_to_token(bos_id)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*bos, "$A"], pair=[*bos, "$A", "$B:1"], special_tokens=[(token, bos_id) for token in bos]
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()


def bytes_tokenizer() -> str:
    """A tokenizer.json with the ids of `BytesTokenizer`."""
    # In byte-level BPE a character stands for a byte: itself if printable, else the next from 256 on.
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = {byte: 256 + i for i, byte in enumerate(b for b in range(256) if b not in seen)}
    vocabulary = {chr(unseen.get(byte, byte)): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])  # 256 and 257
    return tokenizer.to_str()
