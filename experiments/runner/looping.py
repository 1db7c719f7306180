"""Scores trained runs with other numbers of loops, for `experiments.evaluate` and `experiments.sweep`."""

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.runner.kept import Kept, made_with
from experiments.runner.points import Point
from experiments.runner.progress import finished_records
from experiments.runner.view import Event, Tell
from mobilellm_jax import data
from mobilellm_jax.config import Config
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.loops import with_repeats
from mobilellm_jax.model.stack import Params
from mobilellm_jax.parallel import partition, processes
from mobilellm_jax.runs.directory import IMPORTED
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check
from mobilellm_jax.sharing import LOOPED
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training.held_out import evaluate_held_out
from mobilellm_jax.training.programs import make_programs

_KEPT = Kept("loops", what="scores by number of loops", again="evaluate")
results_path = _KEPT.path
Entry = dict[str, Any]


def looped(config: Config, num_repeats: int) -> Config:
    """The config of a run with another number of loops, also one not drawn; errors as in `with_repeats`."""
    model, train = with_repeats(config.model, num_repeats), dataclasses.replace(config.train, loops="")
    return dataclasses.replace(config, model=model, train=train)


def score_loops(
    counts: Sequence[int], path: AnyPath, workdir: AnyPath, config: Config, params: Params
) -> Iterator[tuple[int, Entry]]:
    """Yields the scores of the held-out rows with each number of loops, as soon as they are kept in `path`.

    Raises:
      UserError: the model has no loops, or the run no held-out rows; before anything is compiled.
    """
    configs = {count: looped(config, count) for count in counts}
    if (workdir / IMPORTED).exists():
        raise UserError(f"{workdir}: an imported run has no held-out rows; name a text with --text")
    _KEPT.check(path)
    mesh, t = check(config), config.train
    prepared = data.prepare(config.data, config.model.vocab_size)
    params = jax.device_put(params, partition.shardings(params, mesh))
    settings = {
        "trained": config.model.num_repeats,
        "text": f"{t.eval_split}:{t.eval_rows or 'all'}",
        **made_with(workdir, config),
    }
    for count, asked in configs.items():
        share = partition.process_share(mesh)
        found = evaluate_held_out(make_programs(asked, mesh), params, prepared, asked, share)
        entry = {
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte,
            "error": found.error,
            **found.measures,
            "levels": found.task and found.task["levels"],
            "layers": asked.model.effective_depth,
            "flops_per_token": accounting.forward_flops_per_token(asked.model, asked.data.sequence_length),
            **settings,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if jax.process_index() == 0:
            _KEPT.add(path, str(count), entry)
        yield count, entry


def lacking(point: Point, workdir: AnyPath, counts: Sequence[int]) -> int:
    """Number of finished comparison runs of a point whose record lacks a count; 0 for one without loops."""
    return sum(map(bool, _lacking_counts(point, workdir, counts).values()))


def _lacking_counts(point: Point, workdir: AnyPath, counts: Sequence[int]) -> dict[str, list[int]]:
    if point.config.model.sharing not in LOOPED:
        return {}
    possible = [count for count in counts if not _refusal(point.config, count)]
    return {
        name: [count for count in possible if str(count) not in (record.loops or {})]
        for name, record in finished_records(point, workdir).items()
    }


def left_out(points: Sequence[Point], counts: Sequence[int]) -> list[str]:
    """A line for each design with loops and number of loops that it cannot have, which is not scored."""
    looped_points = [point for point in points if point.config.model.sharing in LOOPED]
    refusals = ((point.name, _refusal(point.config, count)) for point in looped_points for count in counts)
    return [f"left out: {name}: {refusal}" for name, refusal in refusals if refusal]


def _refusal(config: Config, count: int) -> str:
    """Why a model cannot have this number of loops, such as parameters for fewer uses; "" if it can."""
    try:
        looped(config, count)
    except UserError as error:
        return str(error)
    return ""


def score_point(point: Point, workdir: AnyPath, tell: Tell, counts: Sequence[int]) -> None:
    """Scores every finished run of a point with the numbers of loops that its record lacks."""
    todo = processes.of_first(lambda: _lacking_counts(point, workdir, counts))
    for name, these in todo.items():
        if not these:
            continue
        directory = workdir / "runs" / name
        config, params = open_run(directory)
        config = dataclasses.replace(config, mesh=point.config.mesh)
        done = score_loops(these, results_path(directory), directory, config, params)
        losses = ", ".join(f"{count} {entry['loss']:.4f}" for count, entry in done)
        tell(Event(name, f"loss by loops: {losses}"))
