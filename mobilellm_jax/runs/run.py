"""One run or several together, from config to record: check, prepare data, train, fill in the record."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mobilellm_jax import data
from mobilellm_jax import validation as rules
from mobilellm_jax.analysis.comparable import data_hashes
from mobilellm_jax.analysis.records import Record, read_record
from mobilellm_jax.config import Config, DataConfig, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.data import ngrams
from mobilellm_jax.data.rows import is_target
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import adapted
from mobilellm_jax.model.ops import attention_kernels
from mobilellm_jax.parallel import partition, processes
from mobilellm_jax.quantization.aware import trained_model
from mobilellm_jax.runs import provenance
from mobilellm_jax.runs.directory import (
    TOKENIZER,
    check_same,
    check_workdir,
    claim_data,
    claim_workdir,
    data_notes,
    repeats_note,
)
from mobilellm_jax.runs.lineage import Parent, claim_parent, open_parent
from mobilellm_jax.runs.provenance import device
from mobilellm_jax.runs.teacher import Teacher, claim_teacher, open_teacher
from mobilellm_jax.storage import writers
from mobilellm_jax.storage.files import AnyPath, write_atomically
from mobilellm_jax.storage.sealed import parse, seal, unseal
from mobilellm_jax.training.loop import Outcome, Trial, train_together
from mobilellm_jax.training.progress import StepLine
from mobilellm_jax.training.trials import check_same_program


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second run of the same shape starts at once.

    The directory is JAX_COMPILATION_CACHE_DIR, by default ~/.cache/mobilellm_jax/xla.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/mobilellm_jax/xla").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check(config: Config) -> Mesh:
    """Builds the mesh of a run and checks it against the devices, the model and the batch.

    Raises:
      UserError: it does not fit, adapters or groups of weights do not fit the model, the compute dtype is
        still "auto", or the devices lack the kernel of attention.
    """
    m = config.model
    valid = "a dtype by now; see `dtypes.with_dtype`"
    rules.check(m.compute_dtype != "auto", "model.compute_dtype", m.compute_dtype, valid)
    if lack := attention_kernels.missing(m.attention, m.compute_dtype, m.head_dim):
        raise UserError(f"model.attention: {m.attention!r} needs {lack}; use 'auto'")
    mesh = partition.make_mesh(config.mesh)
    partition.check_divisible(config, mesh)
    trained_model(config)
    return mesh


def finished_record(path: AnyPath, config: Config) -> Record | None:
    """Reads the record at `path`; None if there is none, or if the run failed and may be tried again.

    Raises:
      UserError: the record is corrupt, or belongs to a run with a different config.
    """
    if not path.exists():
        return None
    record = read_record(path)
    check_same(path, record.config, config)
    return None if record.status == "failed" else record


def agreed_record(path: AnyPath, config: Config) -> Record | None:
    """Calls `finished_record` on process 0 and broadcasts it: other hosts may see a file later."""

    def fields() -> dict[str, Any] | None:
        record = finished_record(path, config)
        return None if record is None else dataclasses.asdict(record)

    found = processes.of_first(fields)
    return None if found is None else Record(**found)


def run(
    config: Config,
    workdir: AnyPath,
    describe: Callable[..., Record],
    say: Callable[[str], None] = print,
) -> Record:
    """Trains in `workdir`, resuming from its checkpoints, and builds the record of the run.

    Args:
      config: the run.
      workdir: its own directory; receives config.json, data.json, metrics.jsonl, tokenizer/, tensorboard/,
        checkpoints/ and, where it begins from another run or has a teacher, parent.json or teacher.json.
      describe: `records.Record` with the fields of the study already set (`functools.partial`).
      say: receives the progress lines.

    Raises:
      UserError: invalid input, found before anything is compiled, or an error of `train`.
      Interrupted, Preempted: on SIGINT, on SIGTERM or SIGHUP.
    """
    return run_together({0: Asked(config, workdir, describe, say)}, 1)[0]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run that is to be done, see `run`."""

    config: Config
    workdir: AnyPath
    describe: Callable[..., Record]
    say: Callable[[str], None] = print


def run_together(runs: Mapping[int, Asked], count: int) -> dict[int, Record]:
    """`run` of several by place, in one program of `count` places, see `training.loop.train_together`.

    Raises:
      UserError, Interrupted, Preempted: as in `run`; or several runs differ in a field that changes the
        program or in the checkpoint of their teacher, or several processes share them.
    """
    check_same_program([asked.config for asked in runs.values()])
    if count > 1 and jax.process_count() > 1:
        raise UserError(f"{count} runs in one program: expected 1 process, found {jax.process_count()}")
    known: dict[tuple[DataConfig, int], data.Dataset] = {}
    opened = {place: _open(asked, known) for place, asked in runs.items()}
    _check_same_teacher(list(opened.values()))
    for of_run in opened.values():
        of_run.asked.say(StepLine.at(0.0, "compiling"))
    first = next(iter(opened.values()))
    taught_by = first.teacher and first.teacher.for_training
    outcomes = train_together({p: o.trial for p, o in opened.items()}, count, first.mesh, taught_by)
    return {place: opened[place].record(outcome) for place, outcome in outcomes.items()}


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A run whose directory is claimed and whose data are prepared."""

    asked: Asked
    mesh: Mesh
    prepared: data.Dataset
    parent: Parent | None
    teacher: Teacher | None

    @property
    def trial(self) -> Trial:
        asked, origin = self.asked, self.parent and self.parent.origin(self.asked.config)
        return Trial(asked.config, self.prepared, asked.workdir, asked.say, origin)

    def record(self, outcome: Outcome) -> Record:
        config, parent, prepared = self.asked.config, self.parent, self.prepared
        # The first rows of the data are those of the parent, where it used some up.
        own_rows = outcome.status == "finished" and not (parent and parent.lineage["first_batch"])
        floor = _floor_fields(config, prepared, self.asked.say) if own_rows else None
        taught_by = self.teacher and self.teacher.as_field(config)
        lineage = {"parent": parent and parent.lineage, "teacher": taught_by}
        return self.asked.describe(**measured_fields(config, prepared.card, outcome), floor=floor, **lineage)


def _open(asked: Asked, known: MutableMapping[tuple[DataConfig, int], data.Dataset]) -> _Opened:
    """Checks a run, claims its directory and prepares its data, unless they are `known`."""
    config, workdir, say = asked.config, asked.workdir, asked.say
    mesh = check(config)
    processes.of_first(lambda: writers.check(config.train.writers))
    processes.of_first(lambda: check_workdir(workdir, config))
    parent, teacher = open_parent(config, workdir), open_teacher(config, workdir, mesh)
    changes = processes.of_first(lambda: claim_workdir(workdir, config))
    if changes:
        say(f"changed since this run was last started: {', '.join(changes)}")
    key = config.data, config.model.vocab_size
    prepared = known[key] = known[key] if key in known else data.prepare(*key)
    card = prepared.card
    processes.check_same("data", ", ".join(f"{k} {v}" for k, v in data_hashes(card, rows=True).items()))
    warning = processes.of_first(lambda: claim_data(workdir, card))
    parent = parent and claim_parent(workdir, parent, card, config)
    if teacher:
        claim_teacher(workdir, teacher, card, config)
    prepared.check_rows(config.train.eval_split)
    if isinstance(prepared, data.TaskData):
        prepared.train.check_steps(config.train.steps, config.train.batch_size)
    for line in filter(None, (warning, *data_notes(card), repeats_note(config, card))):
        say(line)
    if jax.process_index() == 0 and (tokenizer := prepared.tokenizer()):
        data.save_tokenizer(tokenizer, workdir / TOKENIZER, card.get("template"))
    return _Opened(asked, mesh, prepared, parent, teacher)


def _check_same_teacher(opened: Sequence[_Opened]) -> None:
    """Checks that all runs began with one checkpoint of their teacher, of which the program has one copy.

    Raises:
      UserError: they began with several; a run that resumes keeps its own, a new one takes the newest.
    """
    lineages = [of_run.teacher and of_run.teacher.lineage for of_run in opened]
    if any(lineage != lineages[0] for lineage in lineages):
        steps = ", ".join(f"step {lineage['step']:,}" for lineage in lineages if lineage)
        raise UserError(
            f"train.teacher: the {len(opened)} runs of one program began with different checkpoints of "
            f"{opened[0].asked.config.train.teacher} ({steps}); train them one by one "
            "(--trials_per_program=1)"
        )


def _floor_fields(
    config: Config, prepared: data.Dataset, say: Callable[[str], None] = print
) -> dict[str, int | float] | None:
    """`Record.floor` of a run.

    None for tasks, "tuning", more than `ngrams.MOST_TOKENS`, which is said, and on other processes than 0.
    """
    t = config.train
    skipped = t.eval_split == "tuning" or jax.process_index() > 0
    if skipped or not isinstance(prepared, data.PreparedData):
        return None
    seen, rows = t.steps * t.batch_size, prepared.num_rows("train")
    if (tokens := min(seen, rows) * config.data.sequence_length) > ngrams.MOST_TOKENS:
        say(f"no n-gram floor: {tokens:,} tokens of training, counted are at most {ngrams.MOST_TOKENS:,}")
        return None
    # A whole epoch has the same rows with every seed.
    seed = t.data_seed if seen < rows else 0
    return _floor(prepared.directory, seed, min(seen, rows), t.eval_rows, t.eval_split)


def _floor(directory: Path, seed: int, seen: int, eval_rows: int, split: str) -> dict[str, int | float]:
    """Losses of n-grams, kept beside the rows: all points of a study see the same, seed by seed."""
    name = f"floor{ngrams.VERSION}-of-{seen}-rows-seed{seed}-on-{eval_rows or 'all'}-{split}.json"
    kept = directory / "floors" / name
    with contextlib.suppress(OSError, ValueError):
        return unseal(parse(kept.read_bytes()))
    floor = _counted_floor(data.open_prepared(directory), seed, seen, eval_rows, split)
    with contextlib.suppress(UserError):  # a disk that is full or read-only loses no trained run
        write_atomically(kept, json.dumps(seal(floor)).encode())
    return floor


def _counted_floor(
    prepared: data.PreparedData, seed: int, seen: int, eval_rows: int, split: str
) -> dict[str, int | float]:
    size = min(seen, 1024)  # the order of the rows does not depend on it
    batches = itertools.islice(prepared.train_batches(batch_size=size, seed=seed), -(-seen // size))
    train = np.concatenate(list(batches))[:seen]
    tuning = train[:0]
    if count := prepared.num_rows("tuning"):
        tuning = np.concatenate(list(prepared.eval_batches(batch_size=1024, split="tuning")))[:count]
    rows = np.concatenate(list(prepared.eval_batches(batch_size=1024, rows=eval_rows, split=split)))
    return ngrams.ngram_losses(
        train, tuning, rows[is_target(rows[:, 1:]).any(1)], prepared.card["vocab_size"]
    )


def planned_fields(config: Config) -> dict[str, Any]:
    """Fields of a record that are known before the run."""
    counts, m = accounting.parameters(config.model), adapted(config)
    trained = {} if m.adapters is None else {"adapters": accounting.adapters(m)}
    return {
        "config": to_dict(config),
        "layer_plan": list(config.model.plan),
        "parameters": {
            **dataclasses.asdict(counts),
            "total": counts.total,
            "non_embedding": counts.non_embedding,
            **trained,
        },
        "budgets": {**accounting.run_budgets(config), "optimizer_bytes": accounting.optimizer_bytes(m)},
        "versions": provenance.versions(),
        "device": device(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def failed_fields(config: Config, error: str) -> dict[str, Any]:
    """All fields of a record but those of the study, for a run that ended in an error."""
    return {
        **planned_fields(config),
        "status": "failed",
        "error": error,
        "data": {},
        "steps": 0,
        "tokens_seen": 0,
        "final": None,
        "best": None,
        "evaluations": [],
        "train_curve": [],
        "timing": dict.fromkeys(["wall_s", "compile_s", "train_s", "tokens_per_second"]),
    }


def measured_fields(config: Config, card: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """All fields of a record but those of the study, for a run that finished or diverged."""
    tokens = outcome.steps * config.train.batch_size * config.data.sequence_length
    evaluations = outcome.evaluations
    finite = [evaluation for evaluation in evaluations if evaluation["loss"] is not None]
    return {
        **planned_fields(config),
        "status": outcome.status,
        "error": outcome.error,
        "data": card,
        "steps": outcome.steps,
        "tokens_seen": tokens,
        "final": finite[-1] if finite else None,
        "best": min(finite, key=lambda evaluation: evaluation["loss"]) if finite else None,
        "evaluations": evaluations,
        "train_curve": thin(outcome.train_curve, 200),
        "by_position": outcome.by_position,
        "documents": outcome.documents,
        "measures": outcome.measures,
        "trials_together": outcome.trials if outcome.trials > 1 else None,
        "timing": {
            "wall_s": outcome.wall_s,
            "compile_s": outcome.compile_s,
            "train_s": outcome.train_s,
            "tokens_per_second": tokens / outcome.train_s,
        },
    }


def thin(curve: list[Any], most: int) -> list[Any]:
    """Thins a curve to at most `most` evenly spaced points, including the last."""
    stride = max(1, -(-len(curve) // most))
    return curve[::-1][::stride][::-1]
