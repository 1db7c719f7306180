"""Measure how long shapes take to make a token and to read a prompt here, and fit a model of latency to it.

  python -m experiments.latency --out=experiments/latency/my_cpu.json        # minutes, on an idle machine
  python -m experiments.latency --out=experiments/latency/my_phone.json --program=llama.cpp   # in few bits
  python -m experiments.latency --table=experiments/latency/my_cpu.json      # what it says
  python -m experiments.latency --table=experiments/latency/my_cpu.json \\
    --config=configs/latency_matched.py:tiny                # designs of a study: predicted beside measured

Measured is our own decoding at batch 1, or with --program=llama.cpp that of llama.cpp (extras `gguf` and
`ondevice`), with random weights: a prompt that fills half of the cache, then tokens one by one. The shapes
are spread over depth, width, feed-forward width, heads, vocabulary, sharing of blocks and slots of the cache
(`costs/latency_design.py`); each type of weights in --weights has a fit of its own, so bits are an axis too.
Of the turns of a shape the fastest counts, as other work on the machine can only add to it; how far the
median lies above it tells whether there was any.

The fit (`costs/latency.py`) is a sum over the work of a shape, with coefficients that are at least 0. Its
error is that of shapes that it did not see: each is predicted by a fit to all others. The target is a median
of at most 10 %. The table in --out has device, threads, versions, all points, coefficients and errors;
`experiments.shapes --budget=decode_ms:...` and studies with `matched="decode_ms"` take it.
"""

import dataclasses
import datetime
import importlib.metadata
from pathlib import Path

from absl import flags

from configs import base
from experiments import cli
from experiments.reporting.tables import plain_table
from experiments.runner import timing
from experiments.runner.studies import points_of
from mobilellm_jax.analysis.latency_table import Table, fitted, read_table, write_table
from mobilellm_jax.config import ModelConfig, from_config_dict
from mobilellm_jax.costs.latency import LLAMA_CPP, OURS, TIMES, check_number, features
from mobilellm_jax.costs.latency_design import designed
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.gguf import GROUP
from mobilellm_jax.runs import provenance
from mobilellm_jax.runs.run import enable_compilation_cache
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS
TARGET = 0.10  # median error of shapes left out
# By --program: what tables call it, its types of weights, and those that are measured by default.
_PROGRAMS = {
    "ours": ("our own decoding", tuple(OURS), ("float32",)),
    "llama.cpp": ("llama.cpp", tuple(LLAMA_CPP), tuple(LLAMA_CPP)),
}


def define_flags() -> None:
    flags.DEFINE_enum(
        "device", "this", ["this"], "what to measure: the CPU or accelerator that JAX finds here"
    )
    flags.DEFINE_string("out", None, "table to make, such as experiments/latency/my_cpu.json")
    flags.DEFINE_string("table", None, "table to show, or to compare with the designs of --config")
    flags.DEFINE_string("config", None, "study whose designs are measured, beside what --table predicts")
    flags.DEFINE_integer("shapes", 40, "number of shapes", 1, 1000)
    flags.DEFINE_enum("program", "ours", list(_PROGRAMS), "whose decoding is measured")
    types = "; ".join(f"{', '.join(kinds)} of {program}" for program, (_, kinds, _) in _PROGRAMS.items())
    flags.DEFINE_list("weights", None, f"types of weights: {types}; default: float32, or all of llama.cpp")
    flags.DEFINE_integer("threads", 1, "cores that may be used; 1 stands for a small core", 1)
    flags.DEFINE_float("megabytes", 100, "weights and cache that a shape reads for a token, at most", 1)
    flags.DEFINE_integer("slots", 512, "largest cache, a power of 2", 32)
    flags.DEFINE_integer("rounds", 20, "turns of each shape", 1)


def main() -> int:
    """Measures or shows, and returns the exit status."""
    if FLAGS.table:
        table = read_table(local_directory("table", FLAGS.table))
        if FLAGS.out:
            raise UserError("--out, --table: give one of them")
        print(summary(table) if FLAGS.config is None else _beside(table, FLAGS.config))
        return 0
    if not FLAGS.out or FLAGS.config:
        raise UserError("--out: missing; name the table to make, or --table=<file> to show one")
    out = local_directory("out", FLAGS.out)
    table = measure(out)
    write_table(table, out)
    print(f"{summary(table)}\nsee {out}")
    return 0


def measure(out: Path) -> Table:
    """Measures and fits.

    Raises:
      UserError: --out exists already, there is no such type of weights, a number does not fit, or llama.cpp
        is not installed.
    """
    if out.exists():
        raise UserError(f"--out={out}: already exists; delete it, or use another name")
    program, kinds, default = _PROGRAMS[FLAGS.program]
    asked = FLAGS.weights or default
    for kind in asked:
        if kind not in kinds:
            raise UserError(f"--weights={kind}: expected some of {', '.join(kinds)}")
    if FLAGS.slots & (FLAGS.slots - 1):
        raise UserError(f"--slots={FLAGS.slots}: not a power of 2; use {1 << (FLAGS.slots.bit_length() - 1)}")
    if program == "llama.cpp" and FLAGS.threads > 1:
        raise UserError(f"--threads={FLAGS.threads}: llama.cpp is measured on one thread; use 1")
    timing.use_threads(FLAGS.threads)
    enable_compilation_cache()
    plain, points = from_config_dict(base.get_config()).model, {}
    opened = {kind: _open(kind) for kind in asked}
    shapes = {kind: _designed(plain, kind) for kind in asked}
    for kind, open_ in opened.items():
        points[kind] = timing.measured(shapes[kind], plain, FLAGS.rounds, open_, _say)
    fits = fitted(points, plain)
    return Table(
        program=program,
        device=provenance.device(),
        threads=FLAGS.threads,
        versions=provenance.versions() | _version_of(program),
        git_commit=provenance.git_commit(),
        command=cli.command(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        base=dataclasses.asdict(plain),
        points={kind: [dataclasses.asdict(point) for point in of] for kind, of in points.items()},
        fits={kind: {time: dataclasses.asdict(fit) for time, fit in of.items()} for kind, of in fits.items()},
    )


def _designed(plain: ModelConfig, kind: str) -> list[tuple[ModelConfig, int]]:
    """Shapes to measure and their slots; UserError if they are too few for a fit."""
    of_kind = dataclasses.replace(plain, compute_dtype=kind) if kind in OURS else plain
    multiple = 1 if kind in OURS else GROUP
    shapes = designed(of_kind, FLAGS.shapes, FLAGS.megabytes, FLAGS.slots, kind, multiple)
    for time in TIMES:
        check_number(features(time, *shapes[0], kind), len(set(shapes)))
    return shapes


def _open(kind: str) -> timing.Open:
    """Opens shapes with weights of a type; UserError if llama.cpp is not installed."""
    return timing.ours if kind in OURS else timing.in_llama_cpp(kind, from_config_dict(base.get_config()))


def _version_of(program: str) -> dict[str, str]:
    return {"xllamacpp": importlib.metadata.version("xllamacpp")} if program == "llama.cpp" else {}


def _say(line: str) -> None:
    print(line, flush=True)


def summary(table: Table) -> str:
    """Coefficients and errors, as text."""
    lines = [f"{table.title}; {table.created[:10]}, jax {table.versions['jax']}"]
    if table.was_busy:
        lines.append(
            f"warning: the machine was not idle: the median turn took {table.busy:.0%} longer than the best"
        )
    for kind, points in table.points.items():
        for time, fit in table.latency(kind).fits[kind].items():
            met = "met" if fit.median_error <= TARGET else "MISSED"
            lines += [
                "",
                f"{time}, weights in {kind}, {len(points)} shapes; error of shapes left out: median "
                f"{fit.median_error:.1%}, largest {max(fit.errors):.0%} "
                f"(target: median at most {TARGET:.0%}: {met})"
                + ("" if fit.cache_mb is None else f"; a cache of about {fit.cache_mb:g} MB"),
                plain_table(
                    {
                        "unit of work": list(fit.coefficients),
                        "ms for one": [f"{value:.4g}" for value in fit.coefficients.values()],
                        "measured from": [f"{fit.ranges[name][0]:.3g}" for name in fit.coefficients],
                        "to": [f"{fit.ranges[name][1]:.3g}" for name in fit.coefficients],
                    }
                ),
            ]
    return "\n".join(lines)


def _beside(table: Table, spec: str) -> str:
    """Measures the designs of a study, and compares with what the table predicts of them."""
    timing.use_threads(table.threads)
    enable_compilation_cache()
    points = {p.facts["design"] or p.facts["point"]: p.config for p in points_of(spec, {}, None, [])}
    shapes = [(config.model, config.data.sequence_length) for config in points.values()]
    kind = (FLAGS.weights or [shapes[0][0].compute_dtype])[0]
    latency, columns = table.latency(kind), {"design": []}
    columns |= {f"{time} {what}": [] for time in TIMES for what in ("predicted", "measured", "error")}
    found = timing.measured(shapes, shapes[0][0], FLAGS.rounds, _open(kind), _say)
    for label, shape, there in zip(points, shapes, found, strict=True):
        columns["design"].append(label)
        for time, predicted in latency.predict(*shape).items():
            value = getattr(there, time)
            columns[f"{time} predicted"].append(f"{predicted:.3g}")
            columns[f"{time} measured"].append(f"{value:.3g}")
            columns[f"{time} error"].append(f"{predicted / value - 1:+.0%}")
    return plain_table(columns)


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
