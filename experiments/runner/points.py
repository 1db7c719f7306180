"""From a study to its points: validated configs, and the facts that their records share."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.base import Study
from experiments import cli
from experiments.reporting import paper_tables
from experiments.runner import names
from mobilellm_jax import data
from mobilellm_jax.analysis import comparable
from mobilellm_jax.analysis.records import budget_name, read_record
from mobilellm_jax.config import Config, from_config_dict, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs import provenance
from mobilellm_jax.runs.directory import check_data, flatten
from mobilellm_jax.storage.files import AnyPath, files_below

# Added to the seeds of the runs that look for the learning rate, so that a point is not judged on the noise
# that its learning rate was chosen by.
TUNING_SEED = 1_000_000

# From the points of the sweep without flags, on 2 CPU cores: 54 s for 1 x 96, 83 s for 8 x 32 of fewer FLOPs.
_LAYER_FLOPS = 1e5


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a point.

    Attributes:
      config: with learning rate and seeds set.
      facts: the fields of its record that are known to the study.
      name: study, preset, point, and what tells it from the point's other runs, as a relative path.
    """

    config: Config
    facts: dict[str, Any]
    name: str


@dataclasses.dataclass(frozen=True)
class Point:
    """A design of a study.

    Attributes:
      name: study, preset and what `names.of_labels` makes of the label, as a relative path.
      config: the validated config, at the study's learning rate and first seeds.
      facts: what all its records have in common.
      learning_rates: the grid that tuning starts from; empty where nothing is tuned.
      tuning_seeds: runs of the best rate and its neighbours.
      seeds: number of runs that count.
      vary: the seeds that change from run to run: "init", "data".
    """

    name: str
    config: Config
    facts: dict[str, Any]
    learning_rates: tuple[float, ...]
    tuning_seeds: int
    seeds: int
    vary: tuple[str, ...]

    def run_names(self) -> list[str]:
        """Names of the comparison runs, by seed; they do not tell the learning rate."""
        return [f"{self.name}-s{seed}" for seed in range(self.seeds)]

    def tuning_run(self, learning_rate: float, index: int) -> Run:
        """A run of which only the end is of interest, and evaluated."""
        name, seed = f"{self.name}-lr{learning_rate:.3g}-s{index}", TUNING_SEED + index
        return self._run("tuning", name, learning_rate, seed, eval_every=self.config.train.steps)

    def comparison_runs(self, learning_rate: float) -> Iterator[Run]:
        every = self.config.train.eval_every
        for seed, name in enumerate(self.run_names()):
            yield self._run("comparison", name, learning_rate, seed, eval_every=every)

    def _run(self, phase: str, name: str, learning_rate: float, seed: int, eval_every: int) -> Run:
        seeds = {f"{kind}_seed": getattr(self.config.train, f"{kind}_seed") + seed for kind in self.vary}
        config = dataclasses.replace(
            self.config,
            optimizer=dataclasses.replace(self.config.optimizer, learning_rate=learning_rate),
            train=dataclasses.replace(self.config.train, eval_every=eval_every, **seeds),
        )
        return Run(config, {**self.facts, "phase": phase, "seed": seed}, name)

    @property
    def runs(self) -> int:
        """About how many runs it takes: for tuning the grid, a refinement, and the repetitions."""
        tuning = len(self.learning_rates) + 1 + 3 * (self.tuning_seeds - 1)
        return self.seeds + (tuning if self.learning_rates else 0)

    @property
    def flops(self) -> float:
        """Training FLOPs of one run."""
        c = self.config
        return self._tokens * accounting.train_flops_per_token(c.model, c.data.sequence_length)

    @property
    def cost(self) -> float:
        """FLOPs, and something for each layer, as thin ones take longer than that. To compare points."""
        return self.flops + self._tokens * _LAYER_FLOPS * self.config.model.effective_depth

    @property
    def _tokens(self) -> int:
        c = self.config
        return c.train.steps * c.train.batch_size * c.data.sequence_length


def points_of(spec: str, overrides: dict[str, Any], seeds: int | None, only: Sequence[str]) -> list[Point]:
    """The points of a study or of a collection of studies, validated: all, or those in `only`.

    Raises:
      UserError: a config is not valid, a budget is not matched, or `only` names a point that is not there.
    """
    points = _all_points(spec, overrides, seeds)
    labels = list(dict.fromkeys(point.facts["point"] for point in points))
    for label in only:
        if label not in labels:
            valid = ", ".join(f'"{label}"' if "," in label else label for label in labels)
            raise UserError(f"--only={label}: no such point; valid: {valid}")
    if not only:
        return points
    chosen = [point for point in points if point.facts["point"] in only]
    return [point for study in _by_study(chosen).values() for point in _compared(study)]


def _all_points(spec: str, overrides: dict[str, Any], seeds: int | None) -> list[Point]:
    module, preset, _ = cli.load_config(spec)
    if hasattr(module, "studies"):
        return [point for member in module.studies(preset) for point in _all_points(member, overrides, seeds)]
    if hasattr(module, "sweep"):
        return _study_points(module, spec, preset, overrides, seeds)
    raise UserError(f"--config={spec}: not a study, it has no sweep(preset); use experiments.train for it")


def _by_study(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    studies: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        studies.setdefault((point.facts["study"], point.facts["preset"]), []).append(point)
    return studies


def _pairs_among(points: Sequence[Point]) -> list[list[str]]:
    """The pairs that the records of these points of one study ask for, and that have both ends among them."""
    labels = {point.facts["point"] for point in points}
    pairs = [pair for point in points for pair in point.facts["pairs"] if labels.issuperset(pair)]
    return [list(pair) for pair in dict.fromkeys(map(tuple, pairs))]


def _compared(points: list[Point]) -> list[Point]:
    """Points chosen of a study, all compared with each other where it asks for no pair of them."""
    if _pairs_among(points) or len(points) < 2:  # of one, the records are to fit those of the others
        return points
    own = _own_pairs(_later_first([point.facts["point"] for point in points]))
    return [
        dataclasses.replace(point, facts={**point.facts, "pairs": own[point.facts["point"]]})
        for point in points
    ]


def said_to_compare(points: Sequence[Point]) -> str:
    """What a sweep of these points compares, one line for each study."""
    lines = []
    for (study, _), chosen in _by_study(points).items():
        said = ", ".join(f"{a!r} with {b!r}" for a, b in _pairs_among(chosen))
        lines.append(
            f"{study}: {f'compares {said}' if said else 'one point, so there is nothing to compare'}"
        )
    return "\n".join(lines)


def prepare_data(points: Sequence[Point], workdir: AnyPath) -> None:
    """Prepares the data of the points, once where several have the same.

    Raises:
      UserError: bad data, or not those of the records and runs that `workdir` has of the points' studies.
    """
    cards: dict[Any, dict[str, Any]] = {}
    of_study: dict[Path, dict[Any, dict[str, Any]]] = {}
    for point in points:
        key = point.config.data, point.config.model.vocab_size
        cards[key] = cards[key] if key in cards else data.prepare(*key).card
        of_study.setdefault(Path(point.name).parent, {})[key] = cards[key]

    def check() -> None:
        for study, known in of_study.items():
            paths = [p for p in files_below(workdir / "results" / study) if p.suffix == ".json"]
            records = [(path, read_record(path)) for path in paths]
            for card in known.values():
                for path, record in records:
                    comparable.check_same_data(path, record, card)
                for path in (workdir / "runs" / study).glob("*"):
                    check_data(path, card)

    processes.of_first(check)


def _study_points(
    module: Any, spec: str, preset: str, overrides: dict[str, Any], seeds: int | None
) -> list[Point]:
    study, overridden = module.study(preset), list(module.sweep(preset))
    for name in overrides:
        if name in ("train.init_seed", "train.data_seed"):
            raise UserError(f"--config.{name}: a sweep sets the seeds itself; use --seeds for how many")
        if any(name in row for row in overridden):
            raise UserError(f"--config.{name}: {spec} varies this field; use --only to choose points")
    rows: list[tuple[dict[str, Any], Config]] = []
    for row in overridden:
        config_dict = module.get_config(preset)
        try:
            for name, value in {**row, **overrides}.items():
                cli.check_field(config_dict, name)
                _set(config_dict, name, value)
            rows.append((row, from_config_dict(config_dict)))
        except UserError as error:
            raise UserError(f"--config={spec}, point {row}: {error}") from None
    if not rows:
        raise UserError(f"--config={spec}: sweep({preset!r}) yields no point")
    configs = [config for _, config in rows]
    given = "optimizer.learning_rate" in overrides  # one rate for all points
    learning_rates = () if given else tuple(study.learning_rates)
    settings = [flatten(to_dict(config)) for config in configs]
    for name in filter(None, [*study.scientific, study.x, study.series]):
        if name not in settings[0]:
            raise UserError(f"--config={spec}: no field {name!r}; {did_you_mean(name, settings[0])}")
    labels = list(study.labels) or [" x ".join(str(s[name]) for name in study.scientific) for s in settings]
    _check_study(spec, study, labels, configs)
    shared = {
        "study": Path(spec.partition(":")[0]).stem,
        "preset": preset,
        "question": study.question,
        "matched": study.matched,
        "scientific": list(study.scientific),
        "nuisance": list(study.nuisance),
        "tuning": "grid" if learning_rates else "transferred" if study.transferred and not given else "none",
        "metric": study.metric,
        "margin": study.margin,
        "command": cli.command(),
        "git_commit": provenance.git_commit(),  # once: files may be edited while the sweep runs
    }
    file_names, folder = names.of_labels(labels), f"{Path(spec.partition(':')[0]).stem}/{preset}"
    own, points = _own_pairs(_pairs(study, labels)), []
    for index, (label, (row, config)) in enumerate(zip(labels, rows, strict=True)):
        x = study.x and {"label": study.x_label, "value": settings[index][study.x], "log": True}
        if x and study.series:
            x["series"] = f"{settings[index][study.series]} {study.series_label}"
        pairs = own.get(label, [])
        facts = {"point": label, "point_index": index, "pairs": pairs, "x": x, "overrides": row}
        points.append(
            Point(
                name=f"{folder}/{file_names[index]}",
                config=config,
                facts={**shared, **facts},
                learning_rates=learning_rates,
                tuning_seeds=study.tuning_seeds,
                seeds=seeds or study.seeds,
                vary=tuple(study.vary),
            )
        )
    return points


def _pairs(study: Study, labels: Sequence[str]) -> list[list[str]]:
    if study.pairs:
        return [list(pair) for pair in study.pairs]
    if study.baseline is not None:
        return [[label, study.baseline] for label in labels if label != study.baseline]
    return _later_first(labels)


def _later_first(labels: Sequence[str]) -> list[list[str]]:
    """All pairs. The difference of a later point from an earlier one says what more depth, say, does."""
    return [[b, a] for a, b in combinations(labels, 2)]


def _own_pairs(pairs: Sequence[list[str]]) -> dict[str, list[list[str]]]:
    """By label the pairs that name it: what its records hold, and `results.pairs_of` joins."""
    own: dict[str, list[list[str]]] = {}
    for pair in pairs:
        for label in dict.fromkeys(pair):
            own.setdefault(label, []).append(pair)
    return own


def _set(config: ConfigDict, name: str, value: Any) -> None:
    try:
        config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {value!r} does not fit: {error}") from None


def _check_study(spec: str, study: Study, labels: Sequence[str], configs: Sequence[Config]) -> None:
    """Checks that the study's declarations fit its points, and that the points fit the budget."""
    if len(labels) != len(configs) or len(set(labels)) != len(labels):
        raise UserError(f"--config={spec}: labels: {labels} do not tell {len(configs)} points apart")
    named = {label for pair in study.pairs for label in pair} | ({study.baseline} - {None})
    for label in named - set(labels):
        raise UserError(f"--config={spec}: no point {label!r} to compare with; {did_you_mean(label, labels)}")
    rates = study.learning_rates
    if tuple(study.nuisance) != ("optimizer.learning_rate",):
        raise UserError(
            f"--config={spec}: nuisance: {study.nuisance} cannot be tuned; only optimizer.learning_rate can"
        )
    standard = any(config.model.parameterization == "standard" for config in configs)
    if study.transferred and (standard or rates):
        raise UserError(
            f"--config={spec}: transferred: takes points with mup or completep, and no learning_rates"
        )
    steps = [b / a for a, b in pairwise(rates)]
    if rates and (len(rates) < 2 or min(steps) <= 1 or max(steps) > min(steps) * (1 + 1e-9)):
        raise UserError(
            f"--config={spec}: learning_rates: {rates} is no grid; expected two or more, rising by one factor"
        )
    if study.matched == "tokens":
        return
    budgets = [
        accounting.budgets(c.model, c.data.sequence_length, c.train.batch_size // c.train.accumulation_steps)
        for c in configs
    ]
    if study.matched not in budgets[0]:
        raise UserError(
            f"--config={spec}: matched: no budget {study.matched!r}; "
            f"{did_you_mean(study.matched, budgets[0])}"
        )
    sizes = [budget[study.matched] for budget in budgets]
    spread = max(sizes) / min(sizes) - 1
    if spread > study.tolerance:
        raise UserError(
            f"--config={spec}: the points are to have equal {budget_name(study.matched)} within "
            f"{study.tolerance:.0%}, but they run from {min(sizes):,} to {max(sizes):,}, {spread:.1%} apart; "
            "python -m experiments.shapes finds shapes that fit"
        )


def table(points: Sequence[Point]) -> str:
    """Returns what each point is and costs, one line for each.

    "no gains" are the parameters without the gains of the norms, which is how the paper counts; beside them
    is what it prints, where the points are rows of the paper.
    """
    header = ["study", "point", "plan", "parameters", "no gains", "paper", "non-emb.", "FLOPs/token"]
    rows = [[*header, "tokens", "runs"]]
    for point in points:
        c, counts = point.config, accounting.parameters(point.config.model)
        printed = paper_tables.of_preset(point.facts["study"], point.facts["preset"])
        plan = " ".join(map(str, c.model.plan))
        rows.append(
            [
                point.facts["study"],
                point.facts["point"],
                plan if len(plan) <= 24 else f"{plan[:14]} ... ({c.model.effective_depth})",
                f"{counts.total:,}",
                f"{counts.as_printed:,}",
                printed[point.facts["point_index"]].printed if printed else "",
                f"{counts.non_embedding:,}",
                f"{accounting.train_flops_per_token(c.model, c.data.sequence_length):.3g}",
                f"{c.train.steps * c.train.batch_size * c.data.sequence_length:,}",
                f"{'about ' if point.learning_rates else ''}{point.runs}",
            ]
        )
    if not any(row[5] for row in rows[1:]):
        rows = [[*row[:5], *row[6:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 3  # columns of words; the numbers go to the right

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(cells))

    return "\n".join(map(line, rows))
