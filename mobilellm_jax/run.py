"""One run, from config to record: check, prepare the data, train, write down what came of it."""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mobilellm_jax import accounting, data, model, partition, processes, results
from mobilellm_jax.checkpoint import load_params
from mobilellm_jax.comparable import data_changes, data_hashes, leakage
from mobilellm_jax.config import Config, from_config_dict, to_dict
from mobilellm_jax.data.splits import BY_PLACE
from mobilellm_jax.data.tokenizers import adds_bos
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import AnyPath, reason, write_atomically
from mobilellm_jax.sealed import parse, seal, unseal, unseal_if_sealed
from mobilellm_jax.train import Outcome, train

# Fields that may differ when a run is resumed: they change where it is computed and watched, not what.
_MAY_CHANGE = (
    *("mesh.", "data.cache_dir", "train.log_every", "train.eval_every", "train.checkpoint_every"),
    *("model.remat", "model.scan_unroll", "model.loss_chunk"),
)

DATA = "data.json"  # in a run directory: the data card of what it trains on
IMPORTED = "imported.json"  # in a run directory whose weights were imported
TOKENIZER = "tokenizer"  # folder of a run directory, as `data.save_tokenizer` writes it


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second run of the same shape starts at once.

    Where JAX_COMPILATION_CACHE_DIR says, if it is set.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/mobilellm_jax/xla").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check(config: Config) -> Mesh:
    """Returns the mesh of a run, after checking that it fits the devices, the model and the batch."""
    mesh = partition.make_mesh(config.mesh)
    partition.check_divisible(config, mesh)
    return mesh


def check_workdir(workdir: AnyPath, config: Config) -> list[str]:
    """Checks that `workdir` holds no checkpoint of a run with another config, else raises UserError.

    Returns:
      The differences that are allowed, see `check_same`.
    """
    if not any(workdir.glob("checkpoints/*")):  # before the first, there is nothing to lose
        return []
    path = workdir / "config.json"
    return check_same(path, read_config(path), config)


def claim_workdir(workdir: AnyPath, config: Config) -> list[str]:
    """Makes `workdir` and writes `config.json` into it, if it holds no checkpoint of another run.

    Returns:
      What changed since the run was last started, in words.

    Raises:
      UserError: the directory cannot be written, or holds imported weights or a run with another config.
    """
    path = workdir / "config.json"
    if (workdir / IMPORTED).exists():
        raise UserError(
            f"--workdir={workdir}: holds imported weights, without an optimizer state to go on from"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        changes = check_workdir(workdir, config)
        write_atomically(path, (json.dumps(seal(to_dict(config)), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({reason(error)})") from None
    return changes


def check_data(workdir: AnyPath, card: dict[str, Any], rows: bool = False) -> str | None:
    """Checks that the checkpoints in `workdir` were trained on the data of a card, with `rows` to the row.

    Returns:
      A warning, where an earlier version kept no data card beside them.

    Raises:
      UserError: on other data, or the data card there is damaged.
    """
    path, names = workdir / DATA, [step.name for step in workdir.glob("checkpoints/*")]
    step = max((int(name) for name in names if name.isdecimal()), default=None)
    if step is None:
        return None
    try:
        changes = data_changes(unseal(parse(path.read_text())), card, rows)
    except FileNotFoundError:
        return f"warning: no {DATA} in {workdir}: cannot check that the data are still those of step {step:,}"
    except ValueError as error:
        raise UserError(f"{path}: not a data card ({error}); restore or delete the file") from None
    if changes:
        raise UserError(
            f"{workdir}: the data changed since step {step:,}: {changes}; "
            "restore the files or use a new --workdir"
        )
    return None


def claim_data(workdir: AnyPath, card: dict[str, Any]) -> str | None:
    """Writes the data card of a run into `workdir`; returns and raises as `check_data` does."""
    warning = check_data(workdir, card, rows=True)
    write_atomically(workdir / DATA, (json.dumps(seal(card), indent=1) + "\n").encode())
    return warning


def open_run(workdir: AnyPath) -> tuple[Config, model.Params]:
    """Returns the config of a run and the parameters of its newest intact checkpoint, in NumPy.

    The run may have been trained or imported, and may still be in progress; nothing in `workdir` is changed.

    Raises:
      UserError: there is no run in `workdir`, its config is damaged, or no checkpoint is intact.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: there is no run here: {path.name} is missing")
    config = from_config_dict(read_config(path))
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), config.model))
    return config, load_params(workdir / "checkpoints", like)


def open_tokenizer(workdir: AnyPath) -> data.Tokenizer | None:
    """Returns the tokenizer that a run keeps in `tokenizer/`; None where it keeps none.

    Raises:
      UserError: it is damaged.
    """
    directory = workdir / TOKENIZER
    return data.load_tokenizer(directory) if directory.exists() else None


def begins_with_bos(workdir: AnyPath, tokenizer: data.Tokenizer) -> bool:
    """Whether BOS comes before a text: as in training; for an imported model, as in transformers."""
    if tokenizer.bos_id is None:
        return False
    return not (workdir / IMPORTED).exists() or adds_bos(tokenizer, workdir / TOKENIZER)


def read_config(path: AnyPath) -> dict[str, Any]:
    """Returns the config of a run, valid, as `to_dict` gives it.

    Raises:
      UserError: it is missing, damaged or no config.
    """
    try:
        values = unseal_if_sealed(parse(path.read_text()))
        from_config_dict(values)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing, but there are checkpoints; use another --workdir") from None
    except ValueError as error:
        raise UserError(f"{path}: not the config of a run ({error}); use another --workdir") from None
    return values


def check_same(path: AnyPath, there: dict[str, Any], config: Config) -> list[str]:
    """Checks that `there`, a config found at `path`, computes the same as `config`.

    Returns:
      The fields that differ without an influence on that, such as "train.eval_every 100 -> 50".

    Raises:
      UserError: other fields differ; the message names them.
    """
    old, new = flatten(there), flatten(to_dict(config))
    changed = [name for name in new if old.get(name) != new[name]]
    differences = [
        f"{name} is {old.get(name)!r} there and {new[name]!r} here"
        for name in changed
        if not name.startswith(_MAY_CHANGE)
    ]
    if differences:
        raise UserError(
            f"{path}: of a run with a different config: {'; '.join(differences)}. "
            "Use another --workdir, or delete what is there"
        )
    return [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in changed]


def finished_record(path: AnyPath, config: Config) -> results.Record | None:
    """Returns the record at `path`; None where there is none, or the run failed and is worth another try.

    Raises:
      UserError: the record is damaged, or of a run with a different config.
    """
    if not path.exists():
        return None
    record = results.read(path)
    check_same(path, record.config, config)
    return None if record.status == "failed" else record


def agreed_record(path: AnyPath, config: Config) -> results.Record | None:
    """Returns `finished_record` as process 0 finds it, in all processes: they may see files later than it."""

    def fields() -> dict[str, Any] | None:
        record = finished_record(path, config)
        return None if record is None else dataclasses.asdict(record)

    found = processes.of_first(fields)
    return None if found is None else results.Record(**found)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"model.width": 64, ...} for nested dictionaries."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def run(
    config: Config,
    workdir: AnyPath,
    describe: Callable[..., results.Record],
    say: Callable[[str], None] = print,
) -> results.Record:
    """Trains in `workdir`, resuming what is there, and returns the record of the run.

    Args:
      config: the run.
      workdir: its own directory; gets config.json, data.json, metrics.jsonl, tokenizer/, tensorboard/ and
        checkpoints/.
      describe: `results.Record` with the fields that only the study knows already set (`functools.partial`).
      say: gets the progress lines.

    Raises:
      UserError: bad input, found before anything is compiled.
      Interrupted, Preempted: on SIGINT, on SIGTERM or SIGHUP.
    """
    mesh = check(config)
    changes = processes.of_first(lambda: claim_workdir(workdir, config))
    if changes:
        say(f"changed since this run was last started: {', '.join(changes)}")
    prepared = data.prepare(config.data, config.model.vocab_size)
    card = prepared.card
    processes.check_same("data", ", ".join(f"{k} {v}" for k, v in data_hashes(card, rows=True).items()))
    warning = processes.of_first(lambda: claim_data(workdir, card))
    for line in filter(None, (warning, *data_notes(card))):
        say(line)
    if isinstance(prepared, data.PreparedData) and card["tokenizer"] and jax.process_index() == 0:
        data.save_tokenizer(data.load_tokenizer(prepared.directory), workdir / TOKENIZER)
    outcome = train(config, prepared, mesh, workdir, say)
    return describe(**measured_fields(config, card, outcome))


def data_notes(card: dict[str, Any]) -> list[str]:
    """What a reader of the losses should know of the held-out text, a line each."""
    notes = [f"warning: {sentence}" for sentence in [leakage(card)] if sentence]
    if card.get("split") == BY_PLACE:
        train, valid = (card["splits"][split]["text_bytes"] for split in ("train", "valid"))
        notes.append(
            f"{card['source']} is one document: its last {valid / (train + valid):.1%} ({valid:,} bytes) "
            "are held out"
        )
    return notes


def planned_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of a record that are known before the run."""
    length = config.data.sequence_length
    rows = config.train.batch_size // config.train.accumulation_steps
    counts = accounting.parameters(config.model)
    return {
        "config": to_dict(config),
        "layer_plan": list(config.model.plan),
        "parameters": {
            **dataclasses.asdict(counts),
            "total": counts.total,
            "non_embedding": counts.non_embedding,
        },
        "budgets": accounting.budgets(config.model, length, rows),
        "versions": results.versions(),
        "device": device(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def failed_fields(config: Config, error: str) -> dict[str, Any]:
    """Returns all fields of a record but those of the study, for a run that ended in an error."""
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
    """Returns all fields of a record but those of the study."""
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
        "timing": {
            "wall_s": outcome.wall_s,
            "compile_s": outcome.compile_s,
            "train_s": outcome.train_s,
            "tokens_per_second": tokens / outcome.train_s,
        },
    }


def device() -> dict[str, Any]:
    """Returns platform, kind and number of the devices of all processes, and the CPU cores of this one."""
    first = jax.devices()[0]
    kind = _cpu() if first.platform == "cpu" else first.device_kind
    cores = len(os.sched_getaffinity(0))
    return {"platform": first.platform, "kind": kind, "count": jax.device_count(), "cores": cores}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def thin(curve: list[Any], most: int) -> list[Any]:
    """Returns at most `most` evenly spaced points of a curve, the last one always."""
    stride = max(1, -(-len(curve) // most))
    return curve[::-1][::stride][::-1]
