"""Run a study: every point, several seeds, then a table, a figure and a verdict.

  python -m experiments.sweep                                                  # the first look, on a laptop
  python -m experiments.sweep --config=configs/layer_sharing.py:small --workdir=runs/small
  python -m experiments.sweep --config=configs/depth_vs_width.py:paper_125m --list
  python -m experiments.sweep --only='4 x 48,8 x 32' --seeds=5 --config.train.steps=1000

Finished points are skipped and a half-done one is resumed, so the same command again goes on after an
interruption. A point that fails or diverges is recorded as such, and the others go on. In --workdir:
results/ has one JSON record for each run, reports/ and figures/ what they show, runs/ checkpoints and logs.
"""

import dataclasses
import functools
import re
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli, report
from mobilellm_jax import accounting, data, results
from mobilellm_jax.config import Config, from_config_dict, to_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.run import (
    check,
    claim_workdir,
    enable_compilation_cache,
    failed_fields,
    finished_record,
    flatten,
    run,
)
from mobilellm_jax.train import duration

_WORKDIR = flags.DEFINE_string("workdir", "runs", "directory of results/, figures/ and runs/")
_LIST = flags.DEFINE_bool("list", False, "print the points with what they cost, and train nothing")
_ONLY = flags.DEFINE_list("only", [], "labels of the points to run, separated by commas; empty runs all")
_SEEDS = flags.DEFINE_integer("seeds", None, "number of seeds for each point; default: as the study says", 1)

_BUDGETS = {"total": "total parameters", "non_embedding": "non-embedding parameters"}
# For the expected time only, measured on the tiny studies on 2 CPU cores: the share of the matrix rate that
# training reaches, and the seconds that a shape (compilation) and a run (evaluation, saving) cost besides.
_EFFICIENCY, _SHAPE_S, _RUN_S = 0.13, 6.0, 1.2


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a study: a design point with a seed.

    Attributes:
      config: the validated config.
      facts: the fields of its record that the study determines.
    """

    config: Config
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Study, preset, point and seed as a relative path."""
        label = re.sub(r"[^A-Za-z0-9_.]+", "-", self.facts["point"])
        return f"{self.facts['study']}/{self.facts['preset']}/{label}-s{self.config.train.init_seed}"

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run."""
        c = self.config
        tokens = c.train.steps * c.train.batch_size * c.data.sequence_length
        return tokens * accounting.train_flops_per_token(c.model, c.data.sequence_length)


def points_of(spec: str, overrides: dict[str, Any], seeds: int | None, only: Sequence[str]) -> list[Point]:
    """Returns all runs of a study or of a collection of studies, validated; nothing is compiled.

    Raises:
      UserError: a config is not valid, a budget is not matched, or `only` names a point that is not there.
    """
    module, preset, _ = cli.load_config(spec)
    if hasattr(module, "studies"):
        points = [
            point for member in module.studies(preset) for point in points_of(member, overrides, seeds, ())
        ]
    elif hasattr(module, "sweep"):
        points = _study_points(module, spec, preset, overrides, seeds)
    else:
        raise UserError(
            f"--config={spec}: not a study, it has no sweep(preset); use experiments.train for it"
        )
    labels = list(dict.fromkeys(point.facts["point"] for point in points))
    for label in only:
        if label not in labels:
            raise UserError(f"--only={label}: no such point; valid: {', '.join(labels)}")
    return [point for point in points if not only or point.facts["point"] in only]


def _study_points(
    module: Any, spec: str, preset: str, overrides: dict[str, Any], seeds: int | None
) -> list[Point]:
    study = module.study(preset)
    for name in overrides:
        if name in ("train.init_seed", "train.data_seed"):
            raise UserError(f"--config.{name}: a sweep sets the seeds itself; use --seeds for how many")
        if any(name in row for row in module.sweep(preset)):
            raise UserError(f"--config.{name}: {spec} varies this field; use --only to choose points")
    rows: list[tuple[dict[str, Any], Config]] = []
    for row in module.sweep(preset):
        config_dict = module.get_config(preset)
        config_dict.update_from_flattened_dict({**row, **overrides})
        try:
            rows.append((row, from_config_dict(config_dict)))
        except UserError as error:
            raise UserError(f"--config={spec}, point {row}: {error}") from None
    matched = _matched(study, [config for _, config in rows])
    points = []
    for index, (row, config) in enumerate(rows):
        settings = flatten(to_dict(config))
        x = study["x"] and {"label": study["x_label"], "value": settings[study["x"]], "log": True}
        facts = {
            "study": Path(spec.partition(":")[0]).stem,
            "preset": preset,
            "point": " x ".join(str(settings[name]) for name in study["scientific"]),
            "point_index": index,
            "question": study["question"],
            "matched": matched,
            "scientific": study["scientific"],
            "baseline": study["baseline"],
            "x": x,
            "overrides": {**row, **overrides},
        }
        for seed in range(seeds or study["seeds"]):
            train = dataclasses.replace(config.train, init_seed=seed, data_seed=seed)
            points.append(Point(dataclasses.replace(config, train=train), facts))
    return points


def _matched(study: dict[str, Any], configs: Sequence[Config]) -> str:
    """Returns which budget the points have in common and how closely, after checking that they do."""
    budget, tolerance = study["matched"], study["tolerance"]
    sizes = [getattr(accounting.parameters(config.model), budget) for config in configs]
    spread = max(sizes) / min(sizes) - 1
    if spread > tolerance:
        raise UserError(
            f"the points are to have equal {_BUDGETS[budget]} within {tolerance:.0%}, but they run from "
            f"{min(sizes):,} to {max(sizes):,}, {spread:.1%} apart"
        )
    return (
        f"{_BUDGETS[budget]}, equal within {spread:.1%}" if spread else f"{_BUDGETS[budget]}, exactly equal"
    )


def table(points: Sequence[Point]) -> str:
    """Returns what each point is and costs, one line for each."""
    header = (
        "study",
        "point",
        "plan",
        "parameters",
        "as printed",
        "non-emb.",
        "FLOPs/token",
        "tokens",
        "seeds",
    )
    lines = {}
    for point in points:
        c, counts = point.config, accounting.parameters(point.config.model)
        plan = " ".join(map(str, c.model.plan))
        key = (point.facts["study"], point.facts["point"])
        seeds = lines[key][-1] + 1 if key in lines else 1
        lines[key] = (
            *key,
            plan if len(plan) <= 24 else f"{plan[:14]} ... ({c.model.effective_depth})",
            f"{counts.total:,}",
            f"{counts.as_printed:,}",
            f"{counts.non_embedding:,}",
            f"{accounting.train_flops_per_token(c.model, c.data.sequence_length):.3g}",
            f"{c.train.steps * c.train.batch_size * c.data.sequence_length:,}",
            seeds,
        )
    rows = [header, *([str(cell) for cell in line] for line in lines.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    left = 3  # columns of words; the numbers go to the right

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(cells))

    return "\n".join(map(line, rows))


def expected_seconds(points: Sequence[Point]) -> float:
    """Returns about how long training the points takes on this machine, from its measured matrix rate."""
    size = 1024
    x = jnp.ones((size, size), points[0].config.model.compute_dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    rate = 2 * size**3 / min(seconds) * jax.device_count()
    shapes = {point.config.model for point in points}
    training = sum(point.flops for point in points) / (rate * _EFFICIENCY)
    return training + len(shapes) * _SHAPE_S + len(points) * _RUN_S


def main() -> int:
    """Runs the sweep, and returns the exit status."""
    points = points_of(cli.config_spec(), cli.overrides(), _SEEDS.value, _ONLY.value)
    print(table(points))
    if _LIST.value:
        return 0
    enable_compilation_cache()
    return sweep(points, Path(_WORKDIR.value))


def sweep(points: Sequence[Point], workdir: Path) -> int:
    """Does the runs that `workdir` has no record of, reports on all, and returns the exit status.

    Raises:
      UserError: bad data, or a `workdir` of another sweep; found before anything is compiled.
    """
    records = {point.name: finished_record(_record_path(workdir, point), point.config) for point in points}
    missing = [point for point in points if records[point.name] is None]
    for point in missing:
        check(point.config)
        claim_workdir(workdir / "runs" / point.name, point.config)
    for data_config, vocab_size in dict.fromkeys((p.config.data, p.config.model.vocab_size) for p in missing):
        data.prepare(data_config, vocab_size)
    if missing:
        print(f"\n{len(points) - len(missing)} of {len(points)} runs are done already", end="; ")
        print(f"the rest will take about {duration(expected_seconds(missing))} (m:ss)", flush=True)
    start = time.perf_counter()
    for done, point in enumerate(missing):
        elapsed = time.perf_counter() - start
        left = f", {duration(elapsed / done * (len(missing) - done))} left" if done else ""
        print(f"[{done + 1}/{len(missing)}{left}] {point.name}", flush=True)
        records[point.name] = _run(workdir, point)
    return _finish(workdir, [record for record in records.values() if record is not None])


def _record_path(workdir: Path, point: Point) -> Path:
    return workdir / "results" / f"{point.name}.json"


def _run(workdir: Path, point: Point) -> results.Record:
    """Returns the record of a run, after writing it; an error in it is recorded and does not go further."""
    directory = workdir / "runs" / point.name
    describe = functools.partial(results.Record, **point.facts)
    try:
        record = run(point.config, directory, describe, say=lambda line: print(f"    {line}", flush=True))
    except Exception as error:  # whatever goes wrong in one run, the others are worth having
        (directory / "error.txt").write_text(traceback.format_exc())
        record = describe(**failed_fields(point.config, f"{type(error).__name__}: {error}".splitlines()[0]))
        print(f"    failed: {record.error} (traceback in {directory / 'error.txt'})", flush=True)
    results.write(record, _record_path(workdir, point))
    return record


def _finish(workdir: Path, records: Sequence[results.Record]) -> int:
    """Prints table and verdict of each study, writes its report, and returns the exit status."""
    for of_study in results.by_study(records).values():
        print("\n" + report.report(of_study, workdir))
    unfinished = [record for record in records if record.status != "finished"]
    for record in unfinished:
        print(f"{record.study}, {record.name}: {record.status}: {record.error}")
    return 1 if unfinished else 0


if __name__ == "__main__":
    cli.run(main, default_config="configs/tour.py:tiny")
