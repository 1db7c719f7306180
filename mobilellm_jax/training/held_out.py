"""Held-out scores: loss, bits per byte of text and, for synthetic tasks, what they measure.

Letters: R evaluated rows of T targets. Losses are added up on the host, in float64.
"""

import functools
import itertools
import math
import types
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Bool, Float, Int

from mobilellm_jax import data, model
from mobilellm_jax.config import Config
from mobilellm_jax.costs import accounting
from mobilellm_jax.data import chat
from mobilellm_jax.training import trials
from mobilellm_jax.training.programs import Programs

_MOST_DOCUMENTS = 500  # of which sums are kept
# `Record.measures` of API calls.
CALLS = {"floor": {"wrong_calls": 1.0}, "ceiling": {"wrong_calls": 0.0}, "levels": None}


class Scores(NamedTuple):
    """Scores of the held-out rows.

    Attributes:
      loss: nats per token.
      bits_per_byte: the same in bits per byte; None without text.
      error: share of wrong rows; None where rows are not right or wrong.
      by_position, documents: see `by_position` and `by_document`; None for tasks.
      measures: of tasks, other than `error`, and of API calls, by name.
      task: of both, `Record.measures`.
    """

    loss: float
    bits_per_byte: float | None
    error: float | None
    by_position: dict[str, list[Any]] | None = None
    documents: dict[str, list[Any]] | None = None
    measures: Mapping[str, float] = types.MappingProxyType({})
    task: dict[str, Any] | None = None


def evaluate_held_out(
    programs: Programs,
    params: model.Params,
    prepared: data.Dataset,
    config: Config,
    share: dict[str, int],
) -> Scores:
    """Scores the held-out rows; `share` selects those of this process, see `partition.process_share`."""
    scoring = _scoring(programs, prepared, config, share)
    batches = next(scoring)
    while True:
        try:
            batches = scoring.send(_evaluated(programs, params, batches))
        except StopIteration as end:
            return end.value


def evaluate_together(
    programs: Programs,
    params: model.Params,
    runs: Mapping[int, tuple[data.Dataset, Config]],
    share: dict[str, int],
) -> dict[int, Scores]:
    """`evaluate_held_out` of several runs by place, whose passes over their rows go side by side."""
    scorings = {place: _scoring(programs, *run, share) for place, run in runs.items()}
    asked, scores = {place: next(scoring) for place, scoring in scorings.items()}, dict[int, Scores]()
    while asked:
        answers = _evaluated_together(programs, params, asked)
        asked = {}
        for place, sums in answers.items():
            try:
                asked[place] = scorings[place].send(sums)
            except StopIteration as end:
                scores[place] = end.value
    return scores


def _evaluated_together(
    programs: Programs, params: model.Params, batches: Mapping[int, Iterator[np.ndarray]]
) -> dict[int, list[dict[str, Any]]]:
    """`_evaluated` of several runs by place, of which some may have fewer batches."""
    passes = []
    for of_runs in itertools.zip_longest(*batches.values()):
        rows = {place: of_run for place, of_run in zip(batches, of_runs, strict=True) if of_run is not None}
        placed = trials.place_rows(programs, programs.eval_rows, rows)
        passes.append((rows.keys(), programs.evaluate(params, placed)))
    passes = jax.device_get(passes)
    return {
        place: [trials.of_place(sums, place) for places, sums in passes if place in places]
        for place in batches
    }


_Scoring = Generator[Iterator[np.ndarray], list[dict[str, Any]], Scores]


def _scoring(programs: Programs, prepared: data.Dataset, config: Config, share: dict[str, int]) -> _Scoring:
    """Scores the held-out rows of a run: yields batches, and is sent what `eval_step` gives for each."""
    t = config.train
    sums = yield prepared.eval_batches(
        batch_size=t.eval_batch_size, rows=t.eval_rows, split=t.eval_split, **share
    )
    loss, error = scores(sums)
    if isinstance(prepared, data.TaskData):
        found = yield from _task_measures(programs, prepared, config, share, sums)
        values = dict(found.values)
        return Scores(loss, None, values.pop("error", None), measures=values, task=found.as_field())
    # Bytes per token is an average over all held-out text, even where `eval_rows` scores only a part of it.
    bytes_per_token = prepared.bytes_per_token(t.eval_split)
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    document_RT = prepared.eval_documents(t.eval_rows, t.eval_split)
    if document_RT is None:
        return Scores(loss, bits, error)
    order = _order(programs, **share)
    nats_RT = _in_order(sums, "nats", order, len(document_RT))
    found = by_position(nats_RT, document_RT >= 0), by_document(nats_RT, document_RT)
    if not config.data.has_answers:
        return Scores(loss, bits, error, *found)
    measures = _call_measures(prepared, config, _in_order(sums, "guesses", order, len(document_RT)))
    return Scores(loss, bits, None, *found, measures=measures, task=CALLS)


def _call_measures(prepared: data.Dataset, config: Config, guesses_RT: np.ndarray) -> dict[str, float]:
    """Share of the calls in the held-out conversations that are not right in every token."""
    tokenizer = prepared.tokenizer()
    assert isinstance(prepared, data.PreparedData)
    assert tokenizer
    rows_RS = prepared.eval_rows(config.train.eval_rows, config.train.eval_split)
    return {"wrong_calls": chat.wrong_calls(rows_RS, guesses_RT, tokenizer)}


def _task_measures(
    programs: Programs,
    prepared: data.TaskData,
    config: Config,
    share: dict[str, int],
    sums: Sequence[Mapping[str, Any]],
) -> Generator[Iterator[np.ndarray], list[dict[str, Any]], data.Measures]:
    """What the task measures, of its held-out rows; `sums` is what `eval_step` gives for them."""
    t, order = config.train, _order(programs, **share)
    task, rows_RS = prepared.of_split(t.eval_split), prepared.rows(t.eval_split, t.eval_rows, 0)
    nats_RT, guesses_RT = (_in_order(sums, name, order, len(rows_RS)) for name in ("nats", "guesses"))
    # Where several answers are right, the rows follow the guesses: at most one more token in each pass.
    for _ in range(task.length):
        ahead_RS = task.follow(rows_RS, guesses_RT)
        (changed,) = np.nonzero((ahead_RS != rows_RS).any(axis=1))
        if not len(changed):
            break
        rows_RS = ahead_RS
        again = yield data.padded_batches(rows_RS.__getitem__, changed, t.eval_batch_size, **share)
        guesses_RT[changed] = _in_order(again, "guesses", order, len(changed))
    counts = accounting.parameters(config.model)
    sizes = {"total": counts.total, "non_embedding": counts.non_embedding}
    return task.measures(rows_RS, nats_RT, guesses_RT, sizes)


def _in_order(sums: Sequence[Mapping[str, Any]], name: str, order: np.ndarray, rows: int) -> np.ndarray:
    """The first R rows of what `eval_step` gives, as one process would read them: [R, T]."""
    return np.concatenate([np.asarray(batch[name])[order] for batch in sums])[:rows]


def _evaluated(
    programs: Programs, params: model.Params, batches: Iterator[np.ndarray]
) -> list[dict[str, Any]]:
    """The results of `eval_step` for each batch, of the rows of all processes."""
    place = functools.partial(jax.make_array_from_process_local_data, programs.eval_rows.sharding)
    found = []
    for rows in batches:
        found.append(programs.evaluate(params, place(rows)))
        jax.block_until_ready(found[-2:-1])  # else a bar over the batches would show what is queued
    return jax.device_get(found)


def _order(programs: Programs, **share: int) -> np.ndarray:
    rows = programs.eval_rows
    assert rows.sharding is not None
    return row_order(rows.sharding, rows.shape[0], **share)


def row_order(sharding: Sharding, size: int, process_index: int, process_count: int) -> np.ndarray:
    """Places of the rows of a batch on the mesh, in the order in which one process would read them: [B]."""
    mine = np.arange(size, dtype=np.int32)[process_index::process_count]
    number_B = jax.make_array_from_process_local_data(sharding, mine)
    return np.argsort(multihost_utils.process_allgather(number_B, tiled=True))


def evaluate_batches(
    programs: Programs, params: model.Params, batches: Iterator[np.ndarray]
) -> tuple[float, float | None]:
    """Computes the loss in nats per token, and for tasks the share of rows with a wrong answer.

    Each batch is this process's part of an array of shape `programs.eval_rows`.
    """
    return scores(_evaluated(programs, params, batches))


def scores(sums: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Computes loss (nats per token) and share of wrong rows from what `eval_step` gives.

    The share is None where `eval_step` compares no answers: for text without calls.
    """
    total = {name: math.fsum(np.asarray(batch[name], np.float64).sum() for batch in sums) for name in sums[0]}
    error = total["wrong"] / total["rows"] if "rows" in total else None
    return total["nats"] / total["targets"], error


def by_position(
    nats_RT: Float[np.ndarray, "R T"], is_target_RT: Bool[np.ndarray, "R T"] | None = None
) -> dict[str, list[Any]]:
    """Loss by place in the row: bins end at positions 1, 2, 4, ... and T, counted from 1.

    Keys: "to" (end of each bin), "loss" (nats per token; None without targets), "targets". Without
    `is_target_RT`, every position has a target.
    """
    length = nats_RT.shape[1]
    ends = [1 << k for k in range((length - 1).bit_length())] + [length]
    starts = np.array([0, *ends[:-1]])
    is_target_RT = np.ones(nats_RT.shape, bool) if is_target_RT is None else is_target_RT
    targets = np.add.reduceat(is_target_RT.sum(axis=0), starts)
    nats = np.add.reduceat(nats_RT.sum(axis=0, dtype=np.float64), starts)
    loss = (nats / np.maximum(targets, 1)).tolist()
    loss = [of_bin if count else None for of_bin, count in zip(loss, targets, strict=True)]
    return {"to": ends, "loss": loss, "targets": targets.tolist()}


def by_document(
    nats_RT: Float[np.ndarray, "R T"], document_RT: Int[np.ndarray, "R T"]
) -> dict[str, list[Any]]:
    """Sums of "nats" and "targets" by document, in order; documents without a target are left out.

    Positions of document -1 have no target. Neighbours are joined, evenly, where there are more than 500
    documents.
    """
    is_target = document_RT.ravel() >= 0
    documents = document_RT.ravel()[is_target]
    targets = np.bincount(documents)
    nats = np.bincount(documents, nats_RT.ravel()[is_target].astype(np.float64))
    has_targets = targets > 0
    nats, targets = nats[has_targets], targets[has_targets]
    groups = min(len(targets), _MOST_DOCUMENTS)
    starts = np.arange(groups) * len(targets) // groups
    return {name: np.add.reduceat(x, starts).tolist() for name, x in (("nats", nats), ("targets", targets))}
