"""What a step with a teacher takes, beside one without."""

from statistics import median

from experiments.reporting.tables import Columns
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.analysis.study import Study

TIMES = (
    "Median over the finished runs, without evaluations and checkpoints; times: of the first point without a "
    "teacher. Runs side by side slow each other down. The paper's steps with a teacher took 3.2 (125M) and "
    "2.6 (350M) times as long: 93 and 109 hours instead of 29 and 42."
)


def table(study: Study) -> Columns:
    """One row for each point; {} for a study without a teacher, or where nothing has finished without one."""
    points = {label: _finished(point.comparison) for label, point in study.points.items()}
    points = {label: runs for label, runs in points.items() if runs}
    plain = [runs for runs in points.values() if not any(run.teacher for run in runs)]
    if not plain or len(plain) == len(points):
        return {}
    base_s, base_flops = _step_s(plain[0]), plain[0][0].train_flops_per_token
    return {
        "point": list(points),
        "steps": [f"{runs[0].steps:,}" for runs in points.values()],
        "ms a step": [f"{1e3 * _step_s(runs):.2f}" for runs in points.values()],
        "times": [f"{_step_s(runs) / base_s:.2f}" for runs in points.values()],
        "FLOPs, times": [f"{runs[0].train_flops_per_token / base_flops:.2f}" for runs in points.values()],
        "minutes a run": [f"{_step_s(runs) * runs[0].steps / 60:.1f}" for runs in points.values()],
    }


def _finished(runs: list[Record]) -> list[Record]:
    return [run for run in runs if run.status == "finished" and run.timing["train_s"]]


def _step_s(runs: list[Record]) -> float:
    return median(run.own_train_s / run.steps for run in runs)
