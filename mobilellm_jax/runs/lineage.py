"""The parent of a run: the run whose checkpoint it starts from, checked before anything is compiled.

What is kept of it, in `parent.json` and in the record, is its lineage: names, steps and hashes.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from mobilellm_jax.analysis.comparable import data_hashes
from mobilellm_jax.config import ROLES, Config, ModelConfig, from_config_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import adapted
from mobilellm_jax.model.growth import sources
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.directory import DATA, IMPORTED, TOKENIZER, open_tokenizer, read_config
from mobilellm_jax.storage.checkpoint import fingerprint, has_checkpoint, newest_intact
from mobilellm_jax.storage.files import AnyPath, path_of, write_atomically
from mobilellm_jax.storage.sealed import parse, seal, unseal
from mobilellm_jax.training.start import Origin
from mobilellm_jax.uses_config import UsesConfig

PARENT = "parent.json"  # in the directory of a run that began from another
# The function that a model computes does not depend on them; the plan stands for the last two.
_FREE = {"init_std", "compute_dtype", "sharing", "num_repeats"}
_GROWN = {"depth", *(field.name for field in dataclasses.fields(UsesConfig))}  # that `train.grow` changes
_BASES = {"base_width", "base_depth"}  # without effect under "standard"


@dataclasses.dataclass(frozen=True)
class Parent:
    """A run that another begins from.

    Attributes:
      directory: of the run.
      config: its config; None once it is no longer needed.
      lineage: {"run" (name of the directory), "step", "manifest_sha256" (of the checkpoint), "tokens" (seen
        in training, by its ancestors too; None if not known), "first_batch", "parent" (lineage of its own
        parent, or None)}.
    """

    directory: AnyPath
    config: Config | None
    lineage: dict[str, Any]

    @property
    def checkpoint(self) -> AnyPath:
        return self.directory / "checkpoints" / str(self.lineage["step"])

    def origin(self, config: Config) -> Origin:
        """What the training loop of a run with this config needs."""
        there, first_batch = self.config, self.lineage["first_batch"]
        checkpoint = None if there is None else self.checkpoint
        model, t = adapted(there or config), config.train
        return Origin(checkpoint, model, t.resume_optimizer, first_batch, t.grow)

    def __str__(self) -> str:
        step, sha256 = self.lineage["step"], self.lineage["manifest_sha256"]
        return f"{self.directory}, step {step:,} (sha256 {sha256[:12]})"


def open_parent(config: Config, workdir: AnyPath) -> Parent | None:
    """Opens the run that `train.init_from` names, with its newest intact checkpoint; None without a name.

    Where `workdir` has a checkpoint of its own, the parent is not needed, but it must not have changed.
    Collective: all processes of a run must call it.

    Raises:
      UserError: the parent is missing, corrupt, `workdir` itself, of another shape, without the optimizer
        state that is asked for, or not the one that the run in `workdir` began from.
    """
    name = config.train.init_from
    if not name:
        return None
    check_apart(config, workdir)
    directory = path_of(os.path.expanduser(name))
    if processes.of_first(lambda: has_checkpoint(workdir / "checkpoints")):
        return Parent(directory, None, processes.of_first(lambda: _kept(workdir, directory, name)))
    there = read_run_config(directory, f"train.init_from: {name}")
    _check_model(name, there.model, config)
    if config.train.resume_optimizer:
        _check_optimizer(name, directory, there, config)
    step = newest_step(directory, f"train.init_from: {name}")
    return Parent(directory, there, processes.of_first(lambda: _lineage(directory, there, step)))


def claim_parent(workdir: AnyPath, parent: Parent, card: dict[str, Any], config: Config) -> Parent:
    """Checks the tokenizer of a parent and writes `parent.json`, unless the run has begun; collective.

    Args:
      workdir: directory of the run.
      parent: from `open_parent`.
      card: data card of the run.
      config: of the run.

    Returns:
      The parent, with the batches it used up where the run goes on in its data.

    Raises:
      UserError: another tokenizer, or one that cannot be compared.
    """
    there = parent.config
    if there is None:
        return parent

    def claim() -> dict[str, Any]:
        if not config.train.resize_embedding:
            otherwise = ", or train.resize_embedding=true, which keeps rows by id"
            check_tokenizer(
                parent.directory, f"train.init_from: {config.train.init_from}", card, config, otherwise
            )
        lineage = parent.lineage
        if config.train.resume_optimizer and _same_rows(parent.directory, there, card, config):
            lineage = {**lineage, "first_batch": _first_batch(parent.directory, there) + lineage["step"]}
        write_atomically(workdir / PARENT, (json.dumps(seal(lineage), indent=1) + "\n").encode())
        return lineage

    return dataclasses.replace(parent, lineage=processes.of_first(claim))


def check_apart(config: Config, workdir: AnyPath) -> None:
    """Raises UserError if `train.init_from` or `train.teacher` is `workdir`."""
    for field, why in (
        ("init_from", "what goes on from a run is a new run in another --workdir"),
        ("teacher", "a teacher is another run"),
    ):
        name = getattr(config.train, field)
        if name and _is_same_place(path_of(os.path.expanduser(name)), workdir):
            raise UserError(f"train.{field}: {name} is --workdir itself; {why}")


def _is_same_place(one: AnyPath, other: AnyPath) -> bool:
    def place(directory: AnyPath) -> str:
        return os.fspath(directory.resolve() if isinstance(directory, Path) else directory).rstrip("/")

    return place(one) == place(other)


def name_of(directory: AnyPath) -> str:
    return Path(os.path.abspath(directory)).name if isinstance(directory, Path) else directory.name


def read_run_config(directory: AnyPath, field: str) -> Config:
    """Reads the config of the run that a field names, such as "train.init_from: runs/first"; collective."""

    def read() -> dict[str, Any]:
        path = directory / "config.json"
        if not path.is_file():
            raise UserError(f"{field}: no run found, {path.name} is missing; check the path")
        return read_config(path)

    return from_config_dict(processes.of_first(read))


def newest_step(directory: AnyPath, field: str) -> int:
    """Finds the newest intact checkpoint of the run that a field names; collective."""
    step, damage = newest_intact(directory / "checkpoints")
    if step is None:
        why = f"no checkpoint is intact ({'; '.join(damage)})" if damage else "it has no checkpoint yet"
        raise UserError(f"{field}: {why}")
    return step


def _read_lineage(workdir: AnyPath) -> dict[str, Any]:
    path = workdir / PARENT
    try:
        return unseal(parse(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, although the run has checkpoints; restore the file") from None
    except ValueError as error:
        raise UserError(f"{path}: not the lineage of a run ({error}); restore the file") from None


def _kept(workdir: AnyPath, directory: AnyPath, name: str) -> dict[str, Any]:
    """The lineage of a run with checkpoints; its parent may be gone, but not have another content."""
    lineage = _read_lineage(workdir)
    step, sha256 = lineage["step"], lineage["manifest_sha256"]
    now = fingerprint(directory / "checkpoints" / str(step))
    if now not in (None, sha256):
        raise UserError(
            f"train.init_from: {name}: its step {step:,} is not the one that the run in {workdir} began from "
            f"(sha256 {sha256[:12]} there, {str(now)[:12]} here); restore it, or use a new --workdir"
        )
    return lineage


def _lineage(directory: AnyPath, there: Config, step: int) -> dict[str, Any]:
    """The lineage of a run that begins from `step` of the run in `directory`."""
    t, own = there.train, _read_lineage(directory) if there.train.init_from else None
    before = 0 if own is None else own["tokens"]
    imported = (directory / IMPORTED).exists()
    new = step * t.batch_size * there.data.sequence_length
    return {
        "run": name_of(directory),
        "step": step,
        "manifest_sha256": fingerprint(directory / "checkpoints" / str(step)),
        "tokens": None if before is None or imported else before + new,
        "first_batch": 0,
        "parent": own,
    }


def _first_batch(directory: AnyPath, there: Config) -> int:
    return _read_lineage(directory)["first_batch"] if there.train.init_from else 0


def _check_model(name: str, there: ModelConfig, config: Config) -> None:
    """Raises UserError unless both models are the same function of their parameters."""
    m = config.model
    names = (name.partition(".") for name, role in ROLES.items() if role.kind == "science")
    fields = [field for group, _, field in names if group == "model" and field not in _FREE]
    if m.parameterization == there.parameterization == "standard":
        fields = [field for field in fields if field not in _BASES]
    if config.train.resize_embedding:
        fields.remove("vocab_size")
    if config.train.grow:
        fields = [field for field in fields if field not in _GROWN]
        sources(config.train.grow, there, m)  # raises if it does not fit
    differ = [
        f"model.{field} is {getattr(there, field)!r} there and {getattr(m, field)!r} here"
        for field in fields
        if getattr(there, field) != getattr(m, field)
    ]
    if there.depth == m.depth and there.plan != m.plan and not config.train.grow:
        old, new = (" ".join(map(str, plan)) for plan in (there.plan, m.plan))
        differ.append(f"the layer plan is {old} there and {new} here (model.sharing, model.num_repeats)")
    if differ:
        resize = "; another vocabulary alone: train.resize_embedding=true"
        hint = resize * (len(differ) == 1 and there.vocab_size != m.vocab_size)
        others = [
            field for field in fields if field not in _GROWN and getattr(there, field) != getattr(m, field)
        ]
        hint += "; other blocks alone: train.grow" * (not others)
        raise UserError(
            f"train.init_from: {name} has another model: {'; '.join(differ)}; use its values, which "
            f"--config=configs/finetune.py:{name} does{hint}"
        )


def _check_optimizer(name: str, directory: AnyPath, there: Config, config: Config) -> None:
    """Raises UserError unless the parent has a state for the optimizer of this run."""
    old, new = there.optimizer.name, config.optimizer.name
    if processes.of_first((directory / IMPORTED).exists):
        why = f"{name} was imported, without an optimizer state"
    elif there.train.lora_rank:
        why = f"{name} has an optimizer state for its adapters only"
    elif old != new:
        why = f"the optimizer of {name} is {old!r}, and optimizer.name is {new!r} here"
    else:
        return
    raise UserError(f"train.resume_optimizer: {why}; use train.resume_optimizer=false")


def check_tokenizer(
    directory: AnyPath, field: str, card: dict[str, Any], config: Config, otherwise: str = ""
) -> None:
    """Raises UserError unless the ids in the rows of a data card mean what they mean to another run.

    What ids of a `tokens:` source mean is not known, so they are taken as they are.

    Args:
      directory: of the other run.
      field: that names it, such as "train.init_from: runs/first".
      card: data card of this run.
      config: of this run.
      otherwise: other advice than another tokenizer.
    """
    here = card["tokenizer_sha256"]
    if here is None:
        return
    tokenizer = open_tokenizer(directory)
    there = tokenizer.sha256 if tokenizer else _card(directory).get("tokenizer_sha256")
    if there == here:
        return
    if there is None:
        raise UserError(
            f"{field} keeps no tokenizer to compare data.tokenizer={config.data.tokenizer!r} "
            "with; give its token ids as a tokens: source"
        )
    advice = "use data of its kind"
    if tokenizer is not None:
        file = next((f.name for f in (directory / TOKENIZER).glob("tokenizer.[jm]*")), None)
        kind = "sentencepiece" if file == "tokenizer.model" else "huggingface"
        spec = "bytes" if file is None else f"{kind}:{directory / TOKENIZER / file}"
        advice = f"use --config.data.tokenizer={spec}"
    raise UserError(
        f"{field} has another tokenizer than data.tokenizer={config.data.tokenizer!r} (sha256 {there[:12]} "
        f"there, {here[:12]} here); {advice}{otherwise}"
    )


def _card(directory: AnyPath) -> dict[str, Any]:
    """The data card of a run; {} for an imported one."""
    path = directory / DATA
    try:
        return unseal(parse(path.read_text())) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: not a data card ({error}); restore the file") from None


def _same_rows(directory: AnyPath, there: Config, card: dict[str, Any], config: Config) -> bool:
    """Whether both runs read the same rows in the same order."""
    old, new = there.train, config.train
    hashes = data_hashes(_card(directory), rows=True)
    return (old.batch_size, old.data_seed, there.data.sequence_length) == (
        new.batch_size,
        new.data_seed,
        config.data.sequence_length,
    ) and hashes == data_hashes(card, rows=True)
