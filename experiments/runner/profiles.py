"""A profile: own designs in every ability of the playground, as one more design each beside those on record.

It is a sweep over the points of `configs/playground.py` with rows added: the data, the length, the rates
searched and the seeds are those of the study; of the own model, everything but `NOT_TAKEN` counts.
"""

import dataclasses
import functools
import shlex
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

from configs import base
from experiments import cli
from experiments.runner.points import Point
from experiments.runner.studies import points_of_module
from mobilellm_jax.analysis.records import Record, budget_name, read_records
from mobilellm_jax.config import IDLE, SEEDS, Config, ModelConfig, flatten, from_config_dict, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.shapes import Rules, solve
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.storage.files import AnyPath

STUDY, CONFIG = "playground", "configs/playground.py"
# What an ability sets of a model: its vocabulary, where learning rate and init apply as given, and how it is
# computed.
NOT_TAKEN = {
    *("vocab_size", "base_width", "base_depth", "init_std", "parameterization"),
    *("compute_dtype", "attention", "remat", "scan_unroll", "loss_chunk"),
}
TAKEN = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in NOT_TAKEN)
_HEAD_DIMS, _FFN_STEP, _FFN_BAND = tuple(range(6, 34, 2)), 1, 0.35


@dataclasses.dataclass(frozen=True)
class Design:
    """A model to be profiled, and what it is called."""

    label: str
    model: ModelConfig


@dataclasses.dataclass(frozen=True)
class Profile:
    """The plan of a profile.

    Attributes:
      size: a collection of the playground.
      points: of all abilities, own designs alone.
      baselines: label of the design that the own ones are compared with, by preset.
      notes: by preset, how the sizes of own designs differ from those of the study.
    """

    size: str
    points: list[Point]
    baselines: dict[str, str]
    notes: dict[str, list[str]]

    def warnings(self) -> list[str]:
        """A line for each own design of another size."""
        return [f"warning: {preset}: {note}" for preset, notes in self.notes.items() for note in notes]


def designs_of(points: Sequence[Point]) -> list[Design]:
    """The designs of a study that differ in what a profile takes of a model, each under its first label."""
    found: dict[tuple[Any, ...], Design] = {}
    for point in points:
        label = point.facts["design"] or point.facts["point"]
        design = Design(f"own {label}", point.config.model)
        found.setdefault(tuple(_fields(design.model).values()), design)
    return list(found.values())


def planned(
    designs: Sequence[Design], size: str, against: AnyPath, seeds: int | None = None, fit: bool = False
) -> Profile:
    """Plans a profile, and checks it against the records in `against`.

    Args:
      fit: gives a design of another size the width, heads and feed-forward width that make it equal.

    Raises:
      UserError: there is no such collection, a label is taken, a design cannot be trained on an ability, or
        the designs on record were trained under other conditions than `configs/playground.py` has now.
    """
    module, _, _ = cli.load_config(CONFIG)
    if size not in module.COLLECTIONS:
        raise UserError(f"--size={size}: no collection of {CONFIG}; {did_you_mean(size, module.COLLECTIONS)}")
    own, points, notes = {design.label for design in designs}, [], {}
    for preset in module.COLLECTIONS[size]:
        whole, notes[preset] = _extended(module, preset, designs, seeds, fit, module.arms(size))
        _check_record(whole, _recorded(against, preset, own), against)
        points += [point for point in whole if point.facts["point"] in own]
    baselines = {preset: module.study(preset).baseline for preset in notes}
    return Profile(size, points, baselines, notes)


def run(profile: Profile, out: AnyPath, against: AnyPath, **options: Any) -> int:
    """Trains what `out` has no record of, reports, and returns the exit status; `options` are of `sweep`."""
    from experiments.runner.sweeping import sweep  # here: half of what is imported, --list needs none of it

    return sweep(profile.points, out, report=functools.partial(_report, profile, against), **options)


def _report(profile: Profile, against: AnyPath, points: Sequence[Point], out: AnyPath) -> int:
    """Writes and prints the profile, and returns 1 if a run did not finish."""
    # Here: two seconds that the processes of the points need not spend.
    from experiments.reporting import profiles

    abilities, unfinished = {}, []
    labels = list(dict.fromkeys(point.facts["point"] for point in points))
    for preset, baseline in profile.baselines.items():
        own = [record for record in _read(out, preset) if record.point in labels]
        if not own:
            continue
        # A rate that diverges in tuning is what the search was looking for: the upper end.
        ended = [r for r in own if (r.phase, r.status) != ("tuning", "diverged")]
        unfinished += [r for r in ended if r.status != "finished"]
        recorded = _recorded(against, preset, labels)
        notes = list(profile.notes[preset])
        if not recorded:
            notes.append(
                f"no records of {CONFIG}:{preset} in {against}: drawn alone; make them with: python -m "
                f"experiments.sweep --config={CONFIG}:{preset} --workdir={against}"
            )
        abilities[preset.removesuffix(f"_{profile.size}")] = profiles.beside(own, recorded, baseline, notes)
    if abilities:
        print("\n" + profiles.write(profile.size, abilities, out))
    for record in unfinished:
        print(f"{record.preset}, {record.name}: {record.status}: {record.error}")
    return 1 if unfinished else 0


def _read(workdir: AnyPath, preset: str) -> list[Record]:
    folder = workdir / "results" / STUDY / preset
    return read_records(folder) if folder.exists() else []


def _recorded(workdir: AnyPath, preset: str, own: Collection[str]) -> list[Record]:
    """The records of a preset under the parameterization of a profile, without own designs."""
    return [r for r in _read(workdir, preset) if r.point not in own and r.arm in ("completep", None)]


def _check_record(points: Sequence[Point], records: Sequence[Record], against: AnyPath) -> None:
    """Raises UserError where designs on record and points of their label differ in what changes a result.

    The learning rate is fitted, and rates are chosen on rows of their own.
    """
    free = IDLE | SEEDS | {"optimizer.learning_rate", "train.eval_split"}
    of_label = {point.facts["point"]: point for point in points}
    for record in {record.point: record for record in records}.values():
        if record.point not in of_label:
            continue
        now, then = flatten(to_dict(of_label[record.point].config)), flatten(record.config)
        changed = [
            f"{name} {then[name]!r}, now {now[name]!r}"
            for name in sorted(now.keys() & then.keys() - free)
            if now[name] != then[name]
        ]
        if changed:
            raise UserError(
                f"--against={against}: {record.study}:{record.preset}, {record.point!r} was trained with "
                f"{'; '.join(changed)}; name records made with this version of {CONFIG}"
            )


def _extended(
    module: Any, preset: str, designs: Sequence[Design], seeds: int | None, fit: bool, arms: Sequence[str]
) -> tuple[list[Point], list[str]]:
    """All points of a study with own designs, and how the sizes of these differ from the others'."""
    spec, study = f"{CONFIG}:{preset}", module.study(preset)
    there = {point.facts["point"]: point for point in points_of_module(module, spec, preset, seeds, arms)}
    equal = [_budget(point.config, study.matched) for point in there.values() if not point.control]
    own, notes, controls = {}, [], []
    for design in designs:
        if design.label in there:
            raise UserError(f"--name={design.label}: is a design of {spec} already; choose another name")
        config = there[study.baseline].config
        config = dataclasses.replace(config, model=_with_fields(config.model, design.model))
        config, note = _sized(design.label, config, study.matched, equal, study.tolerance, fit)
        if note:
            notes.append(note)
            controls.append(design.label)
        own[design.label] = {**there[study.baseline].facts["overrides"], **_fields(config.model)}
    arm_fields = {name for of_arm in study.arms.values() for name in of_arm}
    rows = [{k: v for k, v in row.items() if k not in arm_fields} for row in own.values()]
    extended = dataclasses.replace(
        study,
        labels=[*study.labels, *own],
        pairs=[*study.pairs, *((label, study.baseline) for label in own)],
        controls=[*study.controls, *controls],
    )
    with_own = SimpleNamespace(
        __file__=module.__file__,
        get_config=module.get_config,
        study=lambda _: extended,
        sweep=lambda _: [*module.sweep(preset), *rows],
    )
    return points_of_module(with_own, spec, preset, seeds, arms), notes


def _sized(
    label: str, config: Config, budget: str, equal: Sequence[float], tolerance: float, fit: bool
) -> tuple[Config, str]:
    """The config, or with `fit` one of equal size; and what is to be said where its size is another."""
    size, low, high = _budget(config, budget), min(equal), max(equal)
    if max(size, high) <= (1 + tolerance) * min(size, low):
        return config, ""
    depth, target = config.model.depth, round((low + high) / 2)
    # As in `experiments.shapes`: then no two shapes are further apart than the tolerance.
    to_each_side = tolerance / (2 + tolerance)
    rules = Rules(head_dims=_HEAD_DIMS, ffn_step=_FFN_STEP, ffn_band=_FFN_BAND, tolerance=to_each_side)
    length = config.data.sequence_length
    try:
        found = solve(config.model, budget, float(target), length=length, rules=rules, depth=depth)
    except UserError as error:
        if fit:
            raise UserError(f"--fit: {label}: {error}; or leave --fit out") from None
        found = None
    if fit and found:
        return dataclasses.replace(config, model=found.config), ""
    note = (
        f"{label} has {size:,.0f} {budget_name(budget)}, the designs on record {target:,} within "
        f"{tolerance:.0%}: a difference may be one of size"
    )
    if found:
        note += f"; --fit makes it equal, as does: {_command(config.model, budget, target)}"
    return config, note


def _command(model: ModelConfig, budget: str, target: int) -> str:
    """The command that finds a shape of equal size."""
    default = from_config_dict(base.get_config()).model
    words = [
        f"--budget={budget}:{target}",
        f"--depth={model.depth}",
        f"--head_dim={','.join(map(str, _HEAD_DIMS))}",
        f"--ffn_step={_FFN_STEP}",
        f"--ffn_band={_FFN_BAND}",
        *(
            f"--config.model.{name}={value}"
            for name in TAKEN
            if (value := getattr(model, name)) != getattr(default, name)
            and (name != "num_kv_heads" or value != model.num_heads)
        ),
    ]
    return f"python -m experiments.shapes {shlex.join(words)}"


def _budget(config: Config, name: str) -> float:
    rows = config.train.batch_size // config.train.accumulation_steps
    return accounting.budgets(config.model, config.data.sequence_length, rows)[name]


def _fields(model: ModelConfig) -> dict[str, Any]:
    """What a profile takes of a model, by dotted name."""
    return {f"model.{name}": getattr(model, name) for name in TAKEN}


def _with_fields(model: ModelConfig, own: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, **{name: getattr(own, name) for name in TAKEN})
