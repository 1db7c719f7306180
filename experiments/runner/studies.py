"""From a study to its points: configs with overrides, labels, pairs, and checks of its declarations."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.base import Study
from experiments import cli
from experiments.runner import arms as arms_of
from experiments.runner import devices, names
from experiments.runner.arms import by_arm
from experiments.runner.latencies import NamedTable, of_study
from experiments.runner.needed import teacher_of
from experiments.runner.points import Point
from mobilellm_jax.analysis.records import budget_name
from mobilellm_jax.config import Config, flatten, from_config_dict, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.shapes import shown
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.runs import provenance

Pairs = list[list[str]]  # of labels


def points_of(
    spec: str, overrides: dict[str, Any], seeds: int | None, only: Sequence[str], arms: Sequence[str] = ()
) -> list[Point]:
    """The points of a study or of a collection of studies, validated: all, or those in `only`.

    Args:
      arms: names of the arms to run; none: those that the collection names, or all.

    Raises:
      UserError: a config is not valid, a budget is not matched, or `only` or `arms` name what is not there.
    """
    points = _all_points(spec, overrides, seeds, arms)
    if arms and not any(point.facts["arm"] for point in points):
        raise UserError(f"--arms={','.join(arms)}: {spec} has no arms; leave the flag out")
    labels = list(dict.fromkeys(point.facts["point"] for point in points))
    for label in only:
        if label not in labels:
            written = {label: f'"{label}"' if "," in label else label for label in labels}
            near = get_close_matches(label, labels, n=3, cutoff=0.7)  # "4x48" is near to "4 x 48"
            meant = " or ".join(repr(written[label]) for label in near)
            hint = f"did you mean {meant}?" if near else f"valid: {', '.join(written.values())}"
            raise UserError(f"--only={label}: no such point; {hint}")
    every = by_arm(points)
    chosen = by_arm([point for point in points if not only or point.facts["point"] in only])
    return [
        point
        for key, arm in chosen.items()
        for point in _planned(_compared(arm) if only else arm, of=every[key])
    ]


def points_of_module(
    module: Any, spec: str, preset: str, seeds: int | None, arms: Sequence[str] = ()
) -> list[Point]:
    """As `points_of`, of a loaded module of one study at one preset; `spec` names it in messages."""
    points = _study_points(module, spec, preset, {}, seeds, arms)
    return [point for arm in by_arm(points).values() for point in _planned(arm, of=arm)]


def shard(points: Sequence[Point], text: str) -> list[Point]:
    """The part "i/n" of the points: i, i + n, i + 2n and so on.

    Raises:
      UserError: it has another form, or no point is left.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    index, count = (int(number) for number in match.groups()) if match else (0, 0)
    if index >= count:
        raise UserError(f"--shard={text}: expected i/n with i from 0 to n - 1, such as 0/4")
    part = list(points[index::count])
    if not part:
        raise UserError(
            f"--shard={text}: there are only {len(points)} points; choose n from 1 to {len(points)}"
        )
    return part


def by_study(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by study and preset."""
    studies: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        studies.setdefault((point.facts["study"], point.facts["preset"]), []).append(point)
    return studies


def _all_points(spec: str, overrides: dict[str, Any], seeds: int | None, arms: Sequence[str]) -> list[Point]:
    module, preset, _ = cli.load_config(spec)
    if members := module.studies(preset) if hasattr(module, "studies") else []:
        arms = arms or tuple(module.arms(preset) if hasattr(module, "arms") else ())
        return [point for member in members for point in _all_points(member, overrides, seeds, arms)]
    if hasattr(module, "sweep"):
        return _study_points(module, spec, preset, overrides, seeds, arms)
    raise UserError(
        f"--config={spec}: not a study, as it has no sweep(preset); train it with python -m experiments.train"
    )


def _study_points(
    module: Any,
    spec: str,
    preset: str,
    overrides: dict[str, Any],
    seeds: int | None,
    asked: Sequence[str],
) -> list[Point]:
    with cli.explained(spec, module.__file__):
        study, rows = module.study(preset), list(module.sweep(preset))
    arms = dict(study.arms) or {None: {}}
    _check_overrides(spec, overrides, rows, study)
    arms_of.check_asked(spec, study, asked)
    if not rows:
        raise UserError(f"--config={spec}: sweep({preset!r}) yields no point")
    table = of_study(spec, study)
    designs, configs = _designs(module, spec, preset, study, rows, overrides, table)
    _check_rates(spec, study, configs)
    given = "optimizer.learning_rate" in overrides  # one rate for all points
    learning_rates = () if given else tuple(study.learning_rates)
    tuning = "fitted" if learning_rates else "transferred" if study.transferred and not given else "none"
    stem = Path(spec.partition(":")[0]).stem
    shared = {
        "study": stem,
        "preset": preset,
        "question": study.question,
        "matched": study.matched,
        "scientific": list(study.scientific),
        "nuisance": list(study.nuisance),
        "tuning": tuning,
        "metric": study.metric,
        "margin": study.margin,
        "command": cli.command(),
        "git_commit": provenance.git_commit(),  # once: files may be edited while the sweep runs
    }
    # Of all arms, whichever are asked for, so that names and places are those of the whole study.
    cases = [(arm, index) for arm in arms for index in range(len(rows))]
    labels = [_label(designs[index], arm, study) for arm, index in cases]
    file_names = names.of_labels(labels)
    own = _own_pairs(
        [[_label(end, arm, study) for end in pair] for arm in arms for pair in _pairs(study, designs)]
    )
    points = []
    for place, ((arm, index), label, config) in enumerate(zip(cases, labels, configs, strict=True)):
        if asked and arm is not None and arm not in asked:
            continue
        facts = {
            **shared,
            "point": label,
            "point_index": place,
            "design": designs[index] if arm else None,
            "arm": arm,
            "pairs": own.get(label, []),
            "x": _x(study, flatten(to_dict(config)), arm),
            "overrides": {**rows[index], **arms[arm]},
            "latency": table and table.field(config),
        }
        point = Point(
            name=f"{stem}/{preset}/{file_names[place]}",
            config=config,
            facts=facts,
            learning_rates=learning_rates,
            tuning_seeds=study.tuning_seeds,
            seeds=seeds or study.seeds,
            vary=tuple(study.vary),
            sd=study.sd,
            control=designs[index] in study.controls,
            teacher=teacher_of(config),
            makes=study.makes,
        )
        points.append(point)
    notes = arms_of.base_shapes(points)
    if table:
        models = dict(zip(designs, (config.model for config in configs), strict=False))
        notes += tuple(table.notes(models, configs[0].data.sequence_length))
    return [replace(point, notes=notes) for point in points]


def _designs(
    module: Any,
    spec: str,
    preset: str,
    study: Study,
    rows: Sequence[dict[str, Any]],
    overrides: dict[str, Any],
    table: NamedTable | None,
) -> tuple[list[str], list[Config]]:
    """The labels of the designs, and the configs of every row in every arm, arm by arm; all checked."""
    arms = list(study.arms.values()) or [{}]
    of_arms = [[_config(module, spec, preset, {**row, **arm}, overrides) for row in rows] for arm in arms]
    settings = [flatten(to_dict(config)) for config in of_arms[0]]
    _check_fields(spec, study, settings[0])
    labels = list(study.labels) or [" x ".join(str(s[name]) for name in study.scientific) for s in settings]
    _check_labels(spec, study, labels, of_arms[0])
    arms_of.check_differ(spec, study, of_arms)
    for configs in of_arms:
        _check_budget(spec, study, labels, configs, table)
    return labels, [config for configs in of_arms for config in configs]


def _label(design: str, arm: str | None, study: Study) -> str:
    """Label of a point: the design alone in the study's first arm, so that it can be quoted as such."""
    return design if arm is None or arm == next(iter(study.arms)) else f"{design} ({arm})"


def _planned(points: Sequence[Point], of: Sequence[Point]) -> list[Point]:
    """The points of one arm with what is planned for them; `plans.with_power` adds the power.

    `of` are all points of the arm: its pairs are judged together, also where its points run one by one.
    """
    pairs = {tuple(pair) for point in (*points, *of) for pair in point.facts["pairs"]}
    same = {"pairs": len(pairs), "power": None}
    plans = [{"seeds": p.seeds, "sd": p.sd, "control": p.control, **same} for p in points]
    return [
        replace(point, facts={**point.facts, "plan": plan}) for point, plan in zip(points, plans, strict=True)
    ]


def _config(module: Any, spec: str, preset: str, row: dict[str, Any], overrides: dict[str, Any]) -> Config:
    """The config of one row of a sweep, validated."""
    config_dict = module.get_config(preset)
    try:
        for name, value in {**row, **overrides}.items():
            cli.check_field(config_dict, name)
            _set(config_dict, name, value)
        return with_dtype(from_config_dict(config_dict), devices.platform)
    except UserError as error:
        raise UserError(f"--config={spec}, point {row}: {error}") from None


def _set(config: ConfigDict, name: str, value: Any) -> None:
    try:
        config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {value!r} does not fit: {error}") from None


def _x(study: Study, settings: Mapping[str, Any], arm: str | None) -> dict[str, Any] | None:
    """Where the study's figure draws a point: its value on the x axis, and the line that it belongs to."""
    if not study.x:
        return None
    x = {"label": study.x_label, "value": settings[study.x], "log": True}
    series = f"{settings[study.series]} {study.series_label}" if study.series else None
    line = ", ".join(filter(None, (series, arm)))
    return {**x, "series": line} if line else x


# --- pairs ----------------------------------------------------------------------------------------------


def pairs_among(points: Sequence[Point]) -> Pairs:
    """The pairs that the records of these points of one study ask for, and that have both ends among them."""
    labels = {point.facts["point"] for point in points}
    pairs = [pair for point in points for pair in point.facts["pairs"] if labels.issuperset(pair)]
    return [list(pair) for pair in dict.fromkeys(map(tuple, pairs))]


def _compared(points: list[Point]) -> list[Point]:
    """Points chosen of a study, all compared with each other too where it asks for no pair of them.

    The pairs that it asks for stay: what they need besides may be run by another command.
    """
    if pairs_among(points) or len(points) < 2:  # of one, the records are to fit those of the others
        return points
    own = _own_pairs(_later_first([point.facts["point"] for point in points]))
    return [
        replace(point, facts={**facts, "pairs": [*facts["pairs"], *own[facts["point"]]]})
        for point in points
        for facts in [point.facts]
    ]


def _pairs(study: Study, labels: Sequence[str]) -> Pairs:
    if study.pairs:
        return [list(pair) for pair in study.pairs]
    if study.baseline is not None:
        return [[label, study.baseline] for label in labels if label != study.baseline]
    return _later_first(labels)


def _later_first(labels: Sequence[str]) -> Pairs:
    """All pairs. The difference of a later point from an earlier one says what more depth, say, does."""
    return [[b, a] for a, b in combinations(labels, 2)]


def _own_pairs(pairs: Pairs) -> dict[str, Pairs]:
    """The pairs that name a label, by label: what its records hold, and `records.pairs_of` joins."""
    own: dict[str, Pairs] = {}
    for pair in pairs:
        for label in dict.fromkeys(pair):
            own.setdefault(label, []).append(pair)
    return own


# --- checks ---------------------------------------------------------------------------------------------


def _check_overrides(
    spec: str, overrides: dict[str, Any], rows: Sequence[dict[str, Any]], study: Study
) -> None:
    for arm, of_arm in study.arms.items():
        for name in of_arm:
            if any(name in row for row in rows):
                raise UserError(f"--config={spec}: arms: {arm!r} sets {name}, which sweep() varies; use one")
            if name in overrides:
                raise UserError(f"--config.{name}: the arm {arm!r} of {spec} sets this field; use --arms")
    for name in overrides:
        if any(name in row for row in rows):
            raise UserError(f"--config.{name}: {spec} varies this field; use --only to choose points")


def _check_fields(spec: str, study: Study, settings: Mapping[str, Any]) -> None:
    for name in filter(None, [*study.scientific, study.x, study.series]):
        if name not in settings:
            raise UserError(f"--config={spec}: no field {name!r}; {did_you_mean(name, settings)}")
    if tuple(study.nuisance) != ("optimizer.learning_rate",):
        raise UserError(
            f"--config={spec}: nuisance: cannot tune {study.nuisance}; only optimizer.learning_rate can"
        )


def _check_labels(spec: str, study: Study, labels: Sequence[str], configs: Sequence[Config]) -> None:
    if len(labels) != len(configs) or len(set(labels)) != len(labels):
        raise UserError(
            f"--config={spec}: labels: {labels} do not tell {len(configs)} points apart; give each its own"
        )
    named = {label for pair in study.pairs for label in pair}
    if study.baseline is not None:
        named.add(study.baseline)
    for label in named - set(labels):
        raise UserError(f"--config={spec}: no point {label!r} to compare with; {did_you_mean(label, labels)}")
    for label in set(study.controls) - set(labels):
        raise UserError(f"--config={spec}: controls: no point {label!r}; {did_you_mean(label, labels)}")


def _check_rates(spec: str, study: Study, configs: Sequence[Config]) -> None:
    rates = study.learning_rates
    standard = any(config.model.parameterization == "standard" for config in configs)
    if study.transferred and (standard or rates):
        raise UserError(
            f"--config={spec}: transferred: needs points with mup or completep, and no learning_rates"
        )
    steps = [b / a for a, b in pairwise(rates)]
    if rates and (len(rates) < 2 or min(steps) <= 1 or max(steps) > min(steps) * (1 + 1e-9)):
        raise UserError(
            f"--config={spec}: learning_rates: {rates} is not a grid; expected two or more, "
            "rising by one factor"
        )


def _check_budget(
    spec: str, study: Study, labels: Sequence[str], configs: Sequence[Config], table: NamedTable | None
) -> None:
    if study.matched == "tokens":
        return
    budgets = [accounting.run_budgets(config, latency=table and table.latency) for config in configs]
    if study.matched not in budgets[0]:
        hint = did_you_mean(study.matched, budgets[0])
        raise UserError(f"--config={spec}: matched: no budget {study.matched!r}; {hint}")
    sizes = [
        budget[study.matched]
        for budget, label in zip(budgets, labels, strict=True)
        if label not in study.controls
    ]
    spread = max(sizes) / min(sizes) - 1 if sizes else 0.0
    if spread > study.tolerance:
        raise UserError(
            f"--config={spec}: points must have equal {budget_name(study.matched)} within "
            f"{study.tolerance:.0%}, but range from {shown(min(sizes))} to {shown(max(sizes))}, "
            f"{spread:.1%} apart; "
            "find shapes that fit with python -m experiments.shapes"
        )
