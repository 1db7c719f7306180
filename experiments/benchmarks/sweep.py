"""Overhead of the sweep without flags: the share of its wall time outside of training steps.

The overhead is start-up, compilation, evaluation, checkpoints, records and figures; the compilation cache is
empty at the start, but the data are prepared. Several points run at the same time, one for each core, so
training time is summed over the processes and compared with wall time times processes. What the protocol
costs, fits of rates and tests with their intervals, is the time to analyse the records once more.
"""

import os
import subprocess
import sys
import time

from experiments.benchmarks import measure as m
from experiments.runner.flags import DEFAULT_STUDY
from experiments.runner.studies import points_of
from mobilellm_jax import data
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.training import signals


def measure(quick: bool) -> list[m.Line]:
    """Measures the minutes of the sweep and the share that is not training, in a single turn."""
    cores = len(os.sched_getaffinity(0))
    study, flags = DEFAULT_STUDY, list[str]()
    if quick:  # another study, as the default one varies train.steps
        study, flags = "configs/depth_vs_width.py:tiny", ["--only=4 x 48", "--arms=completep", "--seeds=1"]
        flags += ["--config.train.steps=8", "--config.optimizer.warmup_steps=2"]
    with signals.scratch_directory("bench-") as workdir:
        command = [
            sys.executable,
            "-m",
            "experiments.sweep",
            f"--config={study}",
            f"--workdir={workdir}",
        ]
        for point in points_of(study, {}, None, []):
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
    start = time.perf_counter()
    for preset in {record.preset for record in records}:
        study_of([record for record in records if record.preset == preset])
    protocol_s = time.perf_counter() - start
    points = len({record.point for record in records})
    side_by_side = min(cores, points)
    train_s = sum(record.own_train_s for record in records)
    run_s, compile_s = (
        sum((record.timing[name] or 0) / (record.trials_together or 1) for record in records)
        for name in ("wall_s", "compile_s")
    )
    evaluate = "runs, with evaluation and checkpoints"
    all_s = side_by_side * wall_s
    return [
        m.Line(f"{study}, {len(records)} runs: wall time", "s", (wall_s,)),
        m.Line("not training steps, share of wall time", "%", (100 * (1 - train_s / all_s),), at_most=15),
        m.Line("of it compilation", "%", (100 * compile_s / all_s,)),
        m.Line(f"of it outside of {evaluate}", "%", (100 * (1 - run_s / all_s),)),
        m.Line("fits, tests and intervals, share of wall time", "%", (100 * protocol_s / wall_s,), at_most=5),
    ]
