"""Runs that are killed or told to stop at random moments, and then go on to the same end."""

import collections
import contextlib
import random
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence

from experiments.soaks.runs import TINY, SoakRun, Trials, running, same, send, wait_until_watched

# What a signal may meet, and its share.
KILLED = {"in the start": 0.15, "in a step": 0.35, "in a save": 0.25, "in an evaluation": 0.25}
SIGNALLED = {
    "while importing": 0.25,
    "while compiling": 0.3,
    "in a step": 0.15,
    "in a save": 0.2,
    "in an evaluation": 0.1,
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ALL_MOMENTS = 8  # so many meet all of them
_IN_A_ROW = 4


def runs(
    straight: SoakRun,
    number: int,
    start_s: float,
    step_s: float,
    rng: random.Random,
    sent: Sequence[signal.Signals],
    moments: Mapping[str, float],
) -> Trials:
    """Yields for every signal whether the run ended as it should, and in the end as the one left alone.

    With it comes what the signal met. A run gets up to `_IN_A_ROW`, one of `sent` each, and is then left to
    finish. Aims at what was met least by its share.
    """
    expected, met = straight.contents(), collections.Counter[str]()
    wanted = moments if number >= _ALL_MOMENTS else {}

    def left() -> int:
        """How many are still to come: more than asked for where a moment was not met."""
        unmet = sum(not met[moment] for moment in wanted)
        return max(number - met.total(), unmet if met.total() < 2 * number else 0)

    while left():
        run = SoakRun(straight.corpus, straight.workdir.with_name("ended"), signal.SIGKILL not in sent)
        found = list[tuple[bool, str]]()
        while len(found) < min(_IN_A_ROW, left()):
            so_far = met + collections.Counter(doing for _, doing in found)
            aim = min(moments, key=lambda moment: (so_far[moment] + rng.random()) / moments[moment])
            long = {"in the start": start_s, "while importing": start_s / 2, "while compiling": start_s / 20}
            wait_s, what = rng.random() * long.get(aim, step_s), rng.choice(sent)
            ended = run.end(aim, rng.randint(1, 12 if aim == "in a step" else 3), wait_s, what)
            if ended is None:
                break
            print(f"  {what.name} {ended[1]}", flush=True)
            found.append(ended)
        run.finish()
        equal = same(run.contents(), expected)
        yield from ((ok and equal, doing) for ok, doing in found)
        met.update(doing for _, doing in found)
        shutil.rmtree(run.workdir)
    yield from ((False, f"none was {moment}") for moment in wanted if not met[moment])


def commands(straight: SoakRun, number: int, start_s: float, rng: random.Random) -> Trials:
    """Yields for signals to sweeps and `plan` whether all their processes ended, and left no lease.

    One that is done before its signal does not count, and one that fails before it does. So does a kind that
    was tried, and always done before.
    """
    tiny = {
        **TINY,
        "data.source": f"files:{straight.corpus}/*.txt",
        "data.cache_dir": straight.corpus / "cache",
    }
    study = {name: value for name, value in tiny.items() if not name.startswith("model.")}
    study |= {"model.vocab_size": 264, "train.steps": 5000}
    config = "--config=configs/depth_vs_width.py:tiny"  # the default one varies train.steps
    # With them, the longest wait over `start_s`: plan takes about twice that, and its last moments are as any
    # program's.
    kinds = [("plan", {}, ("--mesh=data:8",), SIGNALS, 1)]
    kinds += [("sweep", study, (config, "--jobs=1"), SIGNALS, 3)]
    kinds += [("sweep", study, (config, "--jobs=2"), (*SIGNALS, signal.SIGKILL), 3)]
    workdir = straight.workdir.with_name("sweep")
    tried, met = list[str](), set[str]()
    for trial in range(number):
        name, fields, flags, sent, longest = kinds[trial % len(kinds)]
        kind = f"{name} {flags[-1]}"
        tried.append(kind)
        what = rng.choice(sent)
        with running(
            name, workdir, fields, *flags, environment={"JAX_ENABLE_COMPILATION_CACHE": "0"}
        ) as process:
            wait_until_watched(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.random() * longest * start_s)
            if process.poll() == 0:
                continue
            ok, output = (False, process.communicate()[0]) if process.returncode else send(process, what)
        held = list(workdir.glob("runs/.leases/*"))
        if not ok or held:
            print(f"{process.returncode}: {held} {output}", flush=True)
        met.add(kind)
        yield ok and not held, f"{what.name} {kind}"
        shutil.rmtree(workdir, ignore_errors=True)
    yield from ((False, f"none of {kind} met its signal") for kind in dict.fromkeys(tried) if kind not in met)
