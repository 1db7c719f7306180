"""Cells of a study over sizes and horizons: one design at one size and horizon, and differences of cells."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from mobilellm_jax.analysis.noise import Noise, inverse_trigamma, noise_of
from mobilellm_jax.analysis.records import Record, by_study
from mobilellm_jax.analysis.statistics import decide
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.analysis.tuning import Tuning
from mobilellm_jax.errors import UserError

REFERENCE = 32  # width over layers of the design that other aspect ratios are compared with
ASPECTS = (96, 32, 12, 4)  # the ratios of the study, which no size has exactly


@dataclasses.dataclass(frozen=True)
class Cell:
    """One design at one size and horizon, and the final losses of its seeds.

    Attributes:
      preset, size: "100k_8" and its part before the last "_".
      horizon: training tokens for each non-embedding parameter, of the designs within the budget.
      design, arm: as in `Record`; arm is "" where the study has none.
      order: "none" (every block once) or the sharing strategy.
      within: False for controls, which have more parameters or more tokens than the size and horizon say.
      parameters, total: outside the embeddings, and all.
      uses: times that each block is applied.
      width, layers: of the residual stream; applied.
      tokens, flops: of training.
      losses: nats per token by seed, of finished runs.
      diverged: runs that did.
      trigram: loss of the trigram counted on the same tokens; None where not recorded.
      rate_excess: loss that the error of the learning rate is expected to cost; 0 if that is not known.
      optimum, curvature: log2 of the fitted rate, and that of the loss there (nats per octave^2); None where
        no optimum was fitted.
      untuned_rate: the rate of the seeds, where none was tuned; else None.
    """

    preset: str
    size: str
    horizon: float
    design: str
    arm: str
    order: str
    within: bool
    parameters: int
    total: int
    uses: tuple[int, ...]
    width: int
    layers: int
    tokens: int
    flops: float
    losses: tuple[float, ...]
    diverged: int
    trigram: float | None
    rate_excess: float = 0.0
    optimum: float | None = None
    curvature: float | None = None
    untuned_rate: float | None = None

    @property
    def aspect(self) -> float:
        """Width over layers applied."""
        return self.width / self.layers

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses))

    @property
    def name(self) -> str:
        return f"{self.preset}, {self.design}" + f" ({self.arm})" * bool(self.arm)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Loss of `cell` minus that of `other`.

    Attributes:
      row: what is compared: "depth" (aspect ratios), or sharing and its controls at one aspect ratio.
      label: the design, in words that are the same at all sizes.
      against: what it is compared with, in such words; it is unshared.
      mean, error: nats per token; standard error.
      half_width: of a band that holds for all differences of the study at once in 95 % of studies.

    Without any spread, from one seed for each cell, `error` and `half_width` are None.
    """

    cell: Cell
    other: Cell
    row: str
    label: str
    against: str
    mean: float
    error: float | None
    half_width: float | None

    @property
    def is_sure(self) -> bool:
        """True where the band excludes 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclasses.dataclass(frozen=True)
class Trend:
    """Change of a difference with the horizon: nats for each doubling of tokens, with a 95 % interval.

    `sizes` are those with several horizons; the slope is their mean, weighted by precision. `p_constant` and
    `p_line` are those of differences so far from one value, or from a line, in each size (chi-square);
    `p_line` is None without three horizons. At `equal_tokens` the law of shape says that a difference is
    constant in the horizon, as its term of tokens is the same for both.
    """

    arm: str
    row: str
    label: str
    against: str
    sizes: tuple[str, ...]
    slope: float
    half_width: float
    p_constant: float
    p_line: float | None = None
    equal_tokens: bool = True


def cells_of(records: Sequence[Record], planned: Sequence[str] = ()) -> tuple[list[Cell], list[str]]:
    """Collects the cells of all presets of one study from finished comparison runs, smallest size first.

    Args:
      records: of all its presets.
      planned: its presets; if none are given, all sizes at all horizons that there are.

    Returns:
      The cells, and what is missing from the study so far, one sentence each.

    Raises:
      UserError: runs of a preset cannot be compared, or the presets were trained on different data.
    """
    cells, missing, hashes = [], [], {}
    for (_, preset), runs in by_study(records).items():
        study = study_of(runs)
        done = {label: point for label, point in study.points.items() if point.finished}
        absent = sorted({label for pair in study.facts.pairs for label in pair} - done.keys())
        if absent:
            missing.append(f"{preset}: no finished run of {', '.join(absent)}.")
        if not done:
            continue
        compared = {
            label: [r for r in point.comparison if r.status == "finished"] for label, point in done.items()
        }
        smallest = min(r.parameters["non_embedding"] for found in compared.values() for r in found)
        shortest = min(r.tokens_seen for found in compared.values() for r in found)
        for label, found in compared.items():
            for run in found:
                for name in ("source_sha256", "tokenizer_sha256"):
                    hashes.setdefault(name, {}).setdefault(run.data[name], preset)
            seeds = max((run.plan["seeds"] for run in found if run.plan), default=0)
            if len(found) < seeds:
                missing.append(f"{preset}: {label} has {len(found)} of {seeds} seeds.")
            diverged = sum(run.status == "diverged" for run in done[label].comparison)
            search = study.verdict.tuning.get(label)
            cells.append(_cell(preset, found, smallest, shortest, diverged, search))
    for name, presets in hashes.items():
        if len(presets) > 1:
            (one, first), (two, second) = list(presets.items())[:2]
            raise UserError(
                f"{name} is {one[:12]} in {first} but {two[:12]} in {second}: such runs cannot be compared; "
                "name presets of the same data with --presets, or rerun the others"
            )
    cells = sorted(cells, key=lambda cell: (size_of(cells, cell.size), cell.horizon))
    there = {cell.preset for cell in cells}
    horizons = sorted({(round(cell.horizon), _suffix(cell.preset)) for cell in cells})
    sizes = dict.fromkeys(cell.size for cell in cells)
    grid = planned or [f"{size}_{horizon}" for size in sizes for _, horizon in horizons if horizon]
    if absent := [preset for preset in dict.fromkeys(grid) if preset not in there]:
        missing.append(f"No finished run at {', '.join(absent)}.")
    return cells, missing


def _suffix(preset: str) -> str:
    return preset.rpartition("_")[2] if "_" in preset else ""


def _cell(
    preset: str, runs: Sequence[Record], smallest: int, shortest: int, diverged: int, search: Tuning | None
) -> Cell:
    run = runs[0]
    counts = Counter(run.layer_plan)
    parameters, tokens = run.parameters["non_embedding"], run.tokens_seen
    repeated = len(run.layer_plan) > len(counts)
    return Cell(
        preset=preset,
        size=preset.rpartition("_")[0] or preset,
        horizon=shortest / smallest,
        design=run.design or run.point,
        arm=run.arm or "",
        order=str(run.config["model"].get("sharing", "explicit plan")) if repeated else "none",
        within=parameters < 1.1 * smallest and tokens < 1.1 * shortest,
        parameters=parameters,
        total=run.parameters["total"],
        uses=tuple(counts.values()),
        width=run.config["model"]["width"],
        layers=len(run.layer_plan),
        tokens=tokens,
        flops=tokens * run.train_flops_per_token,
        losses=tuple(run.loss for run in sorted(runs, key=lambda run: run.seed)),
        diverged=diverged,
        trigram=run.floor["trigram"] if run.floor else None,
        rate_excess=(search and search.excess) or 0.0,
        optimum=math.log2(search.fitted) if search and search.fitted else None,
        curvature=search and search.curvature,
        untuned_rate=None if search else run.learning_rate,
    )


def size_of(cells: Sequence[Cell], size: str) -> int:
    """Non-embedding parameters of a size: the fewest of its cells."""
    return min(cell.parameters for cell in cells if cell.size == size)


def moderated(cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation over seeds of each cell, shrunk towards that of all, and its degrees of freedom.

    A few seeds say little about a spread; what all cells say is a prior, as in limma (Smyth 2004), as strong
    as the cells' spreads are alike. 0 where no cell has two seeds. Not `noise.variance_prior`, which is
    cautious for the sake of few points: with it the law's intervals cover 0.90 instead of 0.95.
    """
    df = np.array([len(cell.losses) - 1 for cell in cells])
    variance = np.array([np.var(cell.losses, ddof=1) if len(cell.losses) > 1 else 0.0 for cell in cells])
    if not df.any():
        return np.zeros(len(cells)), df.astype(float)
    d = df[df > 0] / 2
    pooled = float(np.sum(df * variance) / np.sum(df))
    logs = np.log(np.maximum(variance[df > 0], 1e-6 * pooled + 1e-300)) - special.digamma(d) + np.log(d)
    excess = float(np.var(logs, ddof=1) - np.mean(special.polygamma(1, d))) if len(logs) > 1 else 0.0
    prior_df, prior = math.inf, pooled
    if excess > special.polygamma(1, 1e6):
        half = inverse_trigamma(excess)
        prior_df = 2 * half
        prior = float(np.exp(np.mean(logs) + special.digamma(half) - np.log(half)))
    if math.isinf(prior_df):
        return np.full(len(cells), math.sqrt(prior)), np.full(len(cells), float(np.sum(df)))
    shrunk = (prior_df * prior + df * variance) / (prior_df + df)
    return np.sqrt(shrunk), prior_df + df


def _noise(cells: Sequence[Cell]) -> Noise:
    """Noise of the cells by their place; equal seeds of different cells are other runs."""
    scores = {str(place): dict(enumerate(cell.losses)) for place, cell in enumerate(cells)}
    return noise_of(scores, may_pair=False)


def differences(cells: Sequence[Cell]) -> list[Difference]:
    """Compares aspect ratios with the one nearest to 32, and shared designs with the unshared of their shape.

    The controls of a shared design have its width, and so the same unshared design to be compared with. Bands
    are the intervals of `statistics.decide`, for all differences at once.
    """
    pairs: list[tuple[Cell, Cell]] = []
    meant, names = meant_aspects(cells), aspect_names(cells)
    for here in _panels(cells):
        unshared = [cell for cell in here if is_plain(cell)]
        if not unshared:
            continue
        reference = min(unshared, key=lambda cell: abs(math.log(meant[cell.size, cell.aspect] / REFERENCE)))
        pairs += [(cell, reference) for cell in unshared if cell is not reference]
        by_width = {cell.width: cell for cell in unshared}
        pairs += [(c, by_width[c.width]) for c in here if c not in unshared and c.width in by_width]
    if not pairs:
        return []
    place = {id(cell): str(index) for index, cell in enumerate(cells)}
    decisions = decide(
        {place[id(cell)]: dict(enumerate(cell.losses)) for cell in cells},
        [(place[id(cell)], place[id(other)]) for cell, other in pairs],
        margin=0.0,
        noise=_noise(cells),
        rate_excess={place[id(cell)]: cell.rate_excess for cell in cells},
    )
    found = []
    for (cell, other), decision in zip(pairs, decisions, strict=True):
        row, label = _named(cell, other, names)
        d = decision.difference
        band = (d.high - d.low) / 2 if d and d.high is not None and d.low is not None else None
        against, mean = names[other.size, other.aspect], cell.loss - other.loss
        error = (d.se if d else 0.0) or None
        found.append(Difference(cell, other, row, label, against, mean, error, band))
    return found


def is_plain(cell: Cell) -> bool:
    """True for the designs whose aspect ratios are compared: unshared, within the budget."""
    return cell.within and cell.order == "none"


def meant_aspects(cells: Sequence[Cell]) -> dict[tuple[str, float], int]:
    """Which of `ASPECTS` an aspect ratio of a size stands for: one each, the nearest on the whole.

    Small sizes do not reach them all: one block of 33,000 parameters has a width of 52.
    """
    found = {}
    for size in dict.fromkeys(cell.size for cell in cells):
        there = sorted({cell.aspect for cell in cells if cell.size == size and is_plain(cell)})
        far = np.abs(np.log(np.array(there)[:, None] / ASPECTS))
        found |= {
            (size, aspect): ASPECTS[int(np.argmin(row))] for aspect, row in zip(there, far, strict=True)
        }
        for place, one in zip(*optimize.linear_sum_assignment(far**2), strict=True):
            found[size, there[place]] = ASPECTS[one]
    return found


def aspect_names(cells: Sequence[Cell]) -> dict[tuple[str, float], str]:
    """Name of an aspect ratio of a size, "D/L 52 to 158": the ratios that stand for the same of `ASPECTS`.

    The widest come first.
    """
    meant = meant_aspects(cells)
    names = {}
    for one in ASPECTS:
        keys = [key for key, of in meant.items() if of == one]
        ratios = sorted(aspect for _, aspect in keys)
        ends = dict.fromkeys(f"{ratio:.3g}" for ratio in (*ratios[:1], *ratios[-1:]))
        names |= dict.fromkeys(keys, f"D/L {' to '.join(ends)}")
    return names


def _named(cell: Cell, other: Cell, names: Mapping[tuple[str, float], str]) -> tuple[str, str]:
    """Row and label of a difference."""
    if is_plain(cell):
        return "depth", names[cell.size, cell.aspect]
    label = cell.order
    if label == "none":
        label = "equal depth, unshared" if cell.layers > other.layers else "equal FLOPs, unshared"
    return f"sharing at {names[other.size, other.aspect]}", label


def trends(found: Sequence[Difference]) -> list[Trend]:
    """Fits a line in log2 horizon to the differences of each design, by weighted least squares."""
    groups: dict[tuple[str, str, str, str], dict[str, list[Difference]]] = {}
    for one in found:
        if one.error:
            key = one.cell.arm, one.row, one.label, one.against
            groups.setdefault(key, {}).setdefault(one.cell.size, []).append(one)
    result = []
    for key, sizes in groups.items():
        slopes, from_mean, from_line = {}, np.zeros(2), np.zeros(2)  # chi-square, degrees of freedom
        for size, of_size in sizes.items():
            x = np.log2([one.cell.horizon for one in of_size])
            weights = np.array([1 / one.error**2 for one in of_size if one.error])
            x = x - np.average(x, weights=weights)
            precision = float(np.sum(weights * x**2))
            if precision > 1e-6:
                y = np.array([one.mean for one in of_size])
                y = y - np.average(y, weights=weights)
                slope = float(np.sum(weights * x * y)) / precision
                slopes[size] = slope, precision
                from_mean += np.sum(weights * y**2), len(y) - 1
                from_line += np.sum(weights * (y - slope * x) ** 2), len(y) - 2
        if slopes:
            total = sum(precision for _, precision in slopes.values())
            result.append(
                Trend(
                    *key,
                    sizes=tuple(slopes),
                    slope=sum(slope * precision for slope, precision in slopes.values()) / total,
                    half_width=1.96 / math.sqrt(total),
                    p_constant=float(stats.chi2.sf(*from_mean)),
                    p_line=float(stats.chi2.sf(*from_line)) if from_line[1] else None,
                    equal_tokens=all(
                        one.cell.tokens == one.other.tokens for of_size in sizes.values() for one in of_size
                    ),
                )
            )
    return result


def _panels(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.preset, cell.arm), []).append(cell)
    return list(groups.values())
