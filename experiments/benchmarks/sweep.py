"""The sweep without flags: how much of its wall time is not training steps.

That is start-up, compilation, evaluation, checkpoints, records and figures; no compiled program is there
before, the data are. Runs of several points go side by side, one for each core, so training time is added up
over the processes and compared with wall time times processes.
"""

import os
import subprocess
import sys
import time

from experiments.benchmarks import measure as m
from experiments.runner.studies import points_of
from mobilellm_jax import data
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.training import signals

_STUDY = "configs/tour.py:tiny"


def measure(quick: bool) -> list[m.Line]:
    """Returns the minutes of the sweep and the share that is not training; a single turn."""
    cores = len(os.sched_getaffinity(0))
    flags = ["--config.train.steps=8", "--config.optimizer.warmup_steps=2", "--seeds=1"] if quick else []
    with signals.scratch_directory("bench-") as workdir:
        command = [sys.executable, "-m", "experiments.sweep", f"--config={_STUDY}", f"--workdir={workdir}"]
        for point in points_of(_STUDY, {}, None, []):
            data.prepare(point.config.data, point.config.model.vocab_size)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(workdir / "xla")}
        start = time.perf_counter()
        with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, env=environment) as process:
            signals.before_end[process] = process.terminate
            status = process.wait()
            del signals.before_end[process]
        if status:
            raise subprocess.CalledProcessError(status, process.args)
        wall_s = time.perf_counter() - start
        records = read_records(workdir / "results")
    points = len({record.point for record in records})
    side_by_side = min(cores, points)
    train_s = sum(record.timing["train_s"] for record in records)
    evaluate = "runs, with evaluation and checkpoints"
    run_s = sum(record.timing["wall_s"] for record in records)
    all_s = side_by_side * wall_s
    return [
        m.Line(f"{_STUDY}, {len(records)} runs: wall time", "s", (wall_s,)),
        m.Line("not training steps, share of wall time", "%", (100 * (1 - train_s / all_s),), at_most=15),
        m.Line("of it compilation", "%", (100 * sum(r.timing["compile_s"] for r in records) / all_s,)),
        m.Line(f"of it outside of {evaluate}", "%", (100 * (1 - run_s / all_s),)),
    ]
