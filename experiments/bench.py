"""Measures speed and memory on this machine, part by part, with its targets beside each number.

  python -m experiments.bench                        # everything, which takes a while
  python -m experiments.bench --only=training,decode
  python -m experiments.bench --only=training --shapes=125m,350m
  python -m experiments.bench --only=ondevice --workdir=runs/first        # a run, in llama.cpp
  python -m experiments.bench --only=training --label=jax_0.12     # beside the record there is
  python -m experiments.bench --show                 # what was measured before, without measuring

Prints a table for each part and leaves `bench/<platform>/<part>.json` in --workdir (with --shapes and
--label, `<part>-125m-350m-<label>.json`), with the machine and the versions. What a part compares is said in
`experiments/benchmarks/<part>.py`. The machine should be idle.
"""

import datetime
import importlib
import json

from absl import flags

from experiments import cli
from experiments.benchmarks import measure, shapes
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.runs import provenance
from mobilellm_jax.storage.files import AnyPath, write_atomically

FLAGS = flags.FLAGS

PARTS: tuple[str, ...] = (
    "training",
    "pytorch",
    "loops",
    "finetuning",
    "compile",
    "decode",
    "ondevice",
    "sweep",
    "trials",
    "checkpoints",
    "input",
    "sharding",
    "zero_shot",
)


def define_flags() -> None:
    flags.DEFINE_list("only", list(PARTS), "parts to measure")
    flags.DEFINE_bool("quick", False, "models and turns so few that the numbers mean nothing: a test")
    flags.DEFINE_bool("show", False, "print the tables of earlier measurements, and measure nothing")
    flags.DEFINE_string("workdir", "experiments", "directory of bench/; a run is what ondevice measures")
    flags.DEFINE_list("shapes", [], "of the parts training and pytorch, only these models: 125m,350m")
    flags.DEFINE_string("label", "", "added to the name of the record, such as a version of JAX")
    flags.DEFINE_string(
        "llama_cpp", None, "folder of a build of llama.cpp with kernels for several processors, for ondevice"
    )
    flags.DEFINE_string(
        "data_dir", None, "folder with local files of tasks for zero_shot; default: questions of bundled text"
    )


def main() -> int:
    """Measures the parts asked for, and returns the exit status."""
    for part in FLAGS.only:
        if part not in PARTS:
            raise UserError(f"--only={part}: there is no such part; {did_you_mean(part, PARTS)}")
    if FLAGS.quick and not FLAGS["workdir"].present:
        raise UserError("--quick: needs --workdir, so that its numbers do not replace measured ones")
    bench = cli.directory("workdir", FLAGS.workdir) / "bench"
    if FLAGS.show:
        print("\n".join(show(bench, FLAGS.only)))
        return 0
    if "/" in FLAGS.label:
        raise UserError(f"--label={FLAGS.label}: part of the name of a file; leave out the '/'")
    modules = {part: importlib.import_module(f"experiments.benchmarks.{part}") for part in FLAGS.only}
    for part, module in modules.items():  # what does not fit is refused before anything is measured
        if hasattr(module, "MODELS"):
            shapes.chosen(module.MODELS)
        elif shapes.asked():
            raise UserError(f"--shapes: does not apply to {part}; add --only=training,pytorch")
    for part, module in modules.items():
        missing = getattr(module, "missing", str)()  # a part that needs an extra can say so
        if missing and not FLAGS["only"].present:
            print(f"\n{part}: left out: {missing}", flush=True)
            continue
        lines = module.measure(FLAGS.quick)
        device = provenance.device()
        record = {
            "part": part,
            "quick": FLAGS.quick,
            "label": FLAGS.label,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": cli.command(),
            "git_commit": provenance.git_commit(),
            "device": device,
            "versions": provenance.versions(*getattr(module, "AGAINST", ())),
            "lines": [line.to_json() for line in lines],
        }
        name = "-".join(filter(None, [part, *shapes.asked(), FLAGS.label]))
        path = bench / device["platform"] / f"{name}.json"
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        print("\n".join(measure.table(record)), flush=True)
    return 0


def show(bench: AnyPath, parts: list[str]) -> list[str]:
    """The tables of all records of these parts, line by line.

    Raises:
      UserError: there is none, or one that cannot be read.
    """
    paths = sorted(path for part in parts for path in bench.glob(f"*/{part}*.json"))
    if not paths:
        raise UserError(f"{bench}: no measurements there; run without --show first")
    lines = []
    for path in paths:
        try:
            lines += measure.table(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a benchmark record ({error!r}); delete it, or measure again"
            ) from None
    return lines


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
