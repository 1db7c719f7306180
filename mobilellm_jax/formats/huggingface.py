"""Hugging Face folders in and out: a checkpoint of the Llama architecture becomes a run directory, and back.

Tensors are in `huggingface_weights.py`, config.json is in `huggingface_config.py`. PyTorch is not needed.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from ml_collections import ConfigDict

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
from mobilellm_jax.runs.directory import IMPORTED, TOKENIZER, begins_with_bos, open_run
from mobilellm_jax.runs.directory import open_tokenizer as read_tokenizer
from mobilellm_jax.storage.checkpoint import save_params
from mobilellm_jax.storage.sealed import seal

_SPECS = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}  # the first that is there
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
FILES = ("config.json", WEIGHTS, INDEX, "*.safetensors", *_SPECS, *_BESIDE)  # that import reads


def import_run(
    folder: Path, workdir: Path, defaults: ConfigDict, sharing: str = "", num_repeats: int = 1
) -> Config:
    """Makes a run directory of a folder with config.json and safetensors, and returns its config.

    It has weights, as float32, but no optimizer state: it can be opened, but not trained on.

    Args:
      folder: what to import; a tokenizer.json or tokenizer.model in it is taken along.
      workdir: the directory to make.
      defaults: of all fields that the folder does not determine.
      sharing: folds layers that are copies back into blocks, by this strategy or explicit plan; "" does not.
      num_repeats: layers made of each block, with a strategy.

    Raises:
      UserError: the folder is damaged or holds another architecture, or `workdir` is there or not writable.
    """
    with _new_directory("workdir", workdir) as directory:
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
    """Makes a folder that transformers loads, of a run, trained or imported, and returns the run's config.

    Args:
      workdir: the run.
      target: the folder to make.
      dtype: of the weights, one of `huggingface_weights.DTYPES`.

    Raises:
      UserError: there is no intact run, it is not a Llama, or `target` is there or not writable.
    """
    with _new_directory("target", target) as directory:
        config, params = open_run(workdir)
        check_exportable(config.model)
        tokenizer = read_tokenizer(workdir)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos")}
        if (workdir / IMPORTED).exists():
            hf = read_object(workdir / IMPORTED)["config"]
            special = {name: hf.get(name) for name in special}
        if tokenizer is not None:
            _write_tokenizer(directory, tokenizer, workdir)
        _write_json(directory / "config.json", export_config(config, dtype, special))
        write_params(directory / WEIGHTS, params, config.model, dtype)
    return config


def _copy_tokenizer(folder: Path, vocab_size: int, workdir: Path) -> str | None:
    """Copies the tokenizer, if there is one, and returns the kind and name of its file.

    Raises:
      UserError: it cannot be read, or has ids that the model does not have.
    """
    specs = [f"{kind}:{folder / name}" for name, kind in _SPECS.items() if (folder / name).is_file()]
    tokenizer = open_tokenizer(specs[0]) if specs else None
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{specs[0]}: has ids up to {tokenizer.vocab_size - 1}, and config.json says "
            f"vocab_size={vocab_size}"
        )
    save_tokenizer(tokenizer, workdir / TOKENIZER)
    for beside in _BESIDE:
        if (folder / beside).is_file():
            shutil.copy(folder / beside, workdir / TOKENIZER)
    return tokenizer.spec


def _config(
    defaults: ConfigDict, fields: dict[str, Any], context: int, spec: str | None, workdir: Path
) -> Config:
    """The config of an imported run. What it was trained on is not known."""
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
    """Writes the files of a run's tokenizer, with which `AutoTokenizer` gives the ids that the model expects.

    What import found is written as it was. Of a trained run, a text begins with BOS, as in training.
    """
    for path in (workdir / TOKENIZER).iterdir():
        if path.name != CARD_FILE:
            shutil.copy(path, target)
    special = tokenizer.bos_id, tokenizer.eos_id
    if isinstance(tokenizer, SentencePieceTokenizer):
        piece = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.file_bytes).id_to_piece
    else:
        theirs = tokenizers.Tokenizer.from_str(tokenizer.file_bytes.decode() or _bytes_tokenizer())
        piece = theirs.id_to_token
        if not (workdir / IMPORTED).exists():
            _put_before(theirs, tokenizer.bos_id)
            (target / "tokenizer.json").write_text(theirs.to_str(pretty=True))
    path = target / "tokenizer_config.json"
    if not path.exists():
        bos, eos = (None if i is None else piece(i) for i in special)
        # Of SentencePiece, the class named after Llama makes other tokens of several spaces in a row, and so
        # does this one without `legacy` (measured with transformers 5.24). Only there does `add_bos_token`
        # decide; elsewhere tokenizer.json does.
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "legacy": True,
            "add_bos_token": begins_with_bos(workdir, tokenizer),
            "bos_token": bos,
            "eos_token": eos,
        }
        path.write_text(json.dumps(values, indent=1) + "\n")


def _put_before(tokenizer: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Makes a tokenizer put BOS, where there is one, and nothing else around a text, however long."""
    bos = [] if bos_id is None else [tokenizer.id_to_token(bos_id)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*bos, "$A"], pair=[*bos, "$A", "$B:1"], special_tokens=[(token, bos_id) for token in bos]
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()


def _bytes_tokenizer() -> str:
    """Returns a tokenizer.json with the ids of `BytesTokenizer`."""
    # In byte-level BPE a character stands for a byte: itself if it can be seen, else the next from 256 on.
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = {byte: 256 + i for i, byte in enumerate(b for b in range(256) if b not in seen)}
    vocabulary = {chr(unseen.get(byte, byte)): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])  # 256 and 257
    return tokenizer.to_str()


@contextlib.contextmanager
def _new_directory(flag: str, path: Path) -> Iterator[Path]:
    """Yields a directory that takes the name of `path`, the value of `flag`, in the end, if nothing fails.

    Raises:
      UserError: the path is there and not empty, or cannot be written.
    """
    final = path.absolute()
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise UserError(f"--{flag}={path}: is there already; use another, or delete what is there")
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(final)
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot write there ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
