"""Zero-shot tasks of two points, question by question: the same questions make the difference more precise.

Both are asked the same questions, of which some are hard for either, so that the difference of two accuracies
is better known than the accuracies (Miller, Adding error bars to evals, arXiv 2411.00640, section 4).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.analysis.statistics import LEVEL
from mobilellm_jax.analysis.verdicts import Comparison

Key = tuple[str, int, str]  # task, number of questions, data
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class PairedAccuracy:
    """Difference of the accuracies of two points on the same questions, from -1 to 1.

    Attributes:
      point, other, task: what is compared.
      questions: their number.
      seeds: of either point.
      mean: accuracy of `point` minus that of `other`, over all their seeds.
      error: standard error from the choice of the questions, clustered by question over the seeds.
      low, high: 95 % interval for other questions, and for other seeds where both have several. None where
        all differences are the same: no spread does not justify an interval of width zero.
      p_value: of McNemar's exact test, for one seed of each; else None.
    """

    point: str
    other: str
    task: str
    questions: int
    seeds: tuple[int, int]
    mean: float
    error: float
    low: float | None
    high: float | None
    p_value: float | None


def paired_accuracies(points: Mapping[str, Point], comparisons: Iterable[Comparison]) -> list[PairedAccuracy]:
    """All pairs of the study and all tasks of which the records of both hold the answers, in that order."""
    answers = {label: _answers(point.finished) for label, point in points.items()}
    return [
        paired_accuracy(c.point, c.other, key[0], answers[c.point][key], answers[c.other][key])
        for c in comparisons
        if {c.point, c.other} <= answers.keys()
        for key in sorted(answers[c.point].keys() & answers[c.other].keys())
    ]


def paired_accuracy(point: str, other: str, task: str, a: Array, b: Array) -> PairedAccuracy:
    """Compares right answers (1, else 0) to the same questions, two or more: a, b [seeds, questions]."""
    of_question = np.mean(a, axis=0) - np.mean(b, axis=0)
    questions, mean = len(of_question), float(np.mean(of_question))
    error = float(np.std(of_question, ddof=1)) / math.sqrt(questions)
    parts = [(error**2, questions - 1)]
    if min(len(a), len(b)) > 1:
        parts += [(_of_seeds(x), len(x) - 1) for x in (a, b)]
    variance = sum(v for v, _ in parts)
    weights = sum(v**2 / df for v, df in parts if v)
    low = high = None
    if weights:
        freedom = variance**2 / weights  # Satterthwaite
        half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
        low, high = mean - half, mean + half
    p_value = None
    if len(a) == len(b) == 1:
        wins, losses = int(np.sum(a > b)), int(np.sum(a < b))  # McNemar's exact test
        p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return PairedAccuracy(point, other, task, questions, (len(a), len(b)), mean, error, low, high, p_value)


def _of_seeds(x: Array) -> float:
    """Variance of the mean of x [seeds, questions] from the seeds, without what differs by question."""
    seeds, questions = x.shape
    of_seed, of_question = np.mean(x, axis=1, keepdims=True), np.mean(x, axis=0, keepdims=True)
    rest = np.sum((x - of_seed - of_question + np.mean(x)) ** 2) / ((seeds - 1) * max(1, questions - 1))
    return max(0.0, float(np.var(of_seed, ddof=1) - rest / questions) / seeds)


def _answers(runs: Sequence[Record]) -> dict[Key, Array]:
    """Right answers by task, [seeds, questions], of the runs that hold them."""
    found: dict[Key, list[list[int]]] = {}
    for run in runs:
        for task, entry in (run.zero_shot or {}).items():
            if len(entry.get("correct", "")) == entry["items"] > 1:
                key = (task, entry["items"], entry["data"])
                found.setdefault(key, []).append([int(answer) for answer in entry["correct"]])
    return {key: np.array(answers, float) for key, answers in found.items()}
