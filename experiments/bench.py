"""Measures speed and memory on this machine, part by part, with its targets beside each number.

  python -m experiments.bench                        # everything
  python -m experiments.bench --only=training,decode

Prints a table for each part and leaves `bench/<platform>/<part>.json` in --workdir, with the machine and the
versions; `experiments/benchmarks/<part>.py` says what the part compares. The machine should be idle.
"""

import datetime
import importlib
import json

from absl import flags

from experiments import cli, tables
from experiments.benchmarks import (
    measure,
    zero_shot,  # noqa: F401, it defines a flag
)
from mobilellm_jax import results, run
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.files import directory

PARTS: tuple[str, ...] = (
    "training",
    "pytorch",
    "compile",
    "decode",
    "sweep",
    "trials",
    "checkpoints",
    "input",
    "sharding",
    "zero_shot",
)

_ONLY = flags.DEFINE_list("only", list(PARTS), "parts to measure")
_QUICK = flags.DEFINE_bool("quick", False, "models and turns so few that the numbers mean nothing: a test")
_WORKDIR = flags.DEFINE_string("workdir", "experiments", "directory of bench/; it may exist")


def main() -> int:
    """Measures the parts asked for, and returns the exit status."""
    for part in _ONLY.value:
        if part not in PARTS:
            raise UserError(f"--only={part}: there is no such part; {did_you_mean(part, PARTS)}")
    for part in _ONLY.value:
        module = importlib.import_module(f"experiments.benchmarks.{part}")
        missing = getattr(module, "missing", str)()  # a part that needs an extra can say so
        if missing and not flags.FLAGS["only"].present:
            print(f"\n{part}: left out: {missing}", flush=True)
            continue
        lines = module.measure(_QUICK.value)
        device = run.device()
        record = {
            "part": part,
            "quick": _QUICK.value,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": cli.command(),
            "git_commit": results.git_commit(),
            "device": device,
            "versions": results.versions(),
            "lines": [line.to_json() for line in lines],
        }
        path = directory("workdir", _WORKDIR.value) / "bench" / device["platform"] / f"{part}.json"
        results.write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        print(f"\n{part}: {device['kind']}, {device['cores']} cores; {path}\n")
        print(tables.markdown_table(measure.columns(lines)), flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
