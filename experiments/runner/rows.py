"""The rows that a trained or imported run is scored on after training."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from mobilellm_jax import data
from mobilellm_jax.config import Config, MeshConfig
from mobilellm_jax.data.pipeline import padded_batches
from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.data.sources import open_source
from mobilellm_jax.data.text import read_text
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.directory import IMPORTED, begins_with_bos, open_tokenizer
from mobilellm_jax.runs.run import check
from mobilellm_jax.storage.files import AnyPath

Batches = Callable[[], Iterator[np.ndarray]]


def rows_to_score(text: str | None, text_field: str, workdir: AnyPath, config: Config) -> Batches:
    """Rows of a text, or without one the held-out rows of a run that was trained.

    Raises:
      UserError: the run was imported and there is no text, or as `rows_of_text`.
    """
    if text:
        return rows_of_text(text, text_field, workdir, config)
    if (workdir / IMPORTED).exists():
        raise UserError(f"{workdir}: an imported run has no held-out rows; name a text with --text")
    return held_out_rows(config)


def held_out_rows(config: Config) -> Batches:
    """The rows that the run is evaluated on, in training's order."""
    t, share = config.train, partition.process_share(check(config))
    prepared = data.prepare(config.data, config.model.vocab_size)
    return lambda: prepared.eval_batches(
        batch_size=t.eval_batch_size,
        rows=t.eval_rows,
        split=t.eval_split,
        **share,
    )


def rows_of_text(spec: str, text_field: str, workdir: AnyPath, config: Config) -> Batches:
    """Rows of a text, as `experiments.evaluate` has them; of "tokens:", each document begins a row.

    Raises:
      UserError: the source cannot be read, is empty, has ids that the model has not, or needs a tokenizer.
    """
    length = config.data.sequence_length
    if spec.startswith("tokens:"):
        rows_RS = _token_rows(spec, length, config.model.vocab_size)
    else:
        tokenizer = open_tokenizer(workdir)
        if tokenizer is None:
            raise UserError(
                f"{workdir}: this run has no tokenizer, which --text={spec} needs; use tokens:<glob>"
            )
        bos = begins_with_bos(workdir, tokenizer)
        rows_RS = read_text(spec, text_field, tokenizer, length, bos).rows_RS
    order, size = np.arange(len(rows_RS)), config.train.eval_batch_size
    share = partition.process_share(check(config))
    return lambda: padded_batches(rows_RS.__getitem__, order, size, **share)


def _token_rows(spec: str, length: int, vocab_size: int) -> np.ndarray:
    rows = []
    for document in open_source(spec, "", "--text").read(lambda count: None):
        ids = np.array(document, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = next(int(i) for i in ids if not 0 <= i < vocab_size)
            raise UserError(f"--text={spec}: token {wrong} is not valid; expected 0 to {vocab_size - 1}")
        for start in range(0, len(ids) - 1, length):
            part = ids[start : start + length + 1]
            rows.append(np.pad(part, (0, length + 1 - len(part)), constant_values=PADDING))
    if not rows:
        raise UserError(f"--text={spec}: has no document of at least 2 tokens")
    return np.stack(rows)


def on_this_machine(config: Config, mesh: MeshConfig | None = None, size: int | None = None) -> Config:
    """The config with a mesh of this machine, batches that it divides, and the attention its devices have.

    Args:
      config: of a run, perhaps trained elsewhere.
      mesh: without one, all devices are along `data`.
      size: rows of a batch; else as in training, rounded up.
    """
    mesh = mesh or MeshConfig(data=-1, fsdp=1, tensor=1)
    if size is None:
        data_size, fsdp_size, _ = partition.mesh_shape(mesh, jax.device_count())
        ways = data_size * fsdp_size
        size = -(-config.train.eval_batch_size // ways) * ways
    sizes = {"batch_size": size, "accumulation_steps": 1, "eval_batch_size": size}
    m = dataclasses.replace(config.model, attention="auto")
    return dataclasses.replace(config, model=m, mesh=mesh, train=dataclasses.replace(config.train, **sizes))
