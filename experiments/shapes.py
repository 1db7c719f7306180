"""Shapes of equal cost, as rows for a config: widths, heads and feed-forward widths for each depth.

  python -m experiments.shapes --budget=total_parameters:125M --depth=4,8,12 --head_dim=32,64 \\
      --config=configs/mobilellm.py:125m
  python -m experiments.shapes --budget=train_flops_per_token:0.8B --width=384,576 \\
      --config=configs/mobilellm.py:125m
  python -m experiments.shapes --budget=non_embedding_parameters:110k --depth=1,2,4,8 --head_dim=16 \\
      --ffn_band=0.25 --config.model.ffn_width=344
  python -m experiments.shapes --budget=decode_ms:0.25 --latency=experiments/latency/my_cpu.json \\
      --depth=1,2,4,8 --head_dim=16 --config=configs/latency_matched.py:tiny

Everything else is as in --config, and so are the proportions: ffn_width / width (within --ffn_band) and the
number of query heads for each key/value head. Where no shape fits, the nearest are printed. With a table of
`experiments.latency`, the milliseconds of a token (with a cache of a row's length) and of a prompt (half of a
row) on its device are printed too, and may be the budget.
"""

import re
from collections.abc import Sequence

from absl import flags

from experiments import cli
from experiments.runner import devices
from experiments.runner.flags import asked_latency, define_latency
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.latency import TIMES
from mobilellm_jax.costs.shapes import BUDGETS, Rules, Shape, shown, solve
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.errors import UserError

FLAGS = flags.FLAGS

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def define_flags() -> None:
    flags.DEFINE_string("budget", None, f"<name>:<value>, such as 110_000, 110k or 125M; {BUDGETS}")
    flags.DEFINE_list("depth", [], "depths to find widths for, separated by commas")
    flags.DEFINE_list("width", [], "widths to find depths for, separated by commas")
    flags.DEFINE_float(
        "tolerance",
        0.02,
        "largest spread (max / min - 1) of the budget over all shapes, as in a study",
        0,
        0.99,
    )
    flags.DEFINE_list("head_dim", [], "head sizes to choose from; default: the config's")
    flags.DEFINE_integer("ffn_step", 4, "ffn_width is a multiple of it", 1)
    define_latency()
    flags.DEFINE_float("ffn_band", 0.15, "how far ffn_width / width may be from the config's", 0, 0.99)


def main() -> int:
    """Prints the shapes, and returns the exit status."""
    budget, target = parse_budget(FLAGS.budget)
    if bool(FLAGS.depth) == bool(FLAGS.width):
        raise UserError("--depth, --width: give exactly one of them, such as --depth=4,8,16")
    if budget in TIMES and not FLAGS.latency:
        raise UserError(f"--latency: missing; name the table of experiments.latency that {budget} is from")
    config = with_dtype(from_config_dict(cli.one_config()), devices.platform)
    length, rows = config.data.sequence_length, config.train.batch_size // config.train.accumulation_steps
    spread, named = FLAGS.tolerance, asked_latency()
    latency = named and named.latency
    rules = Rules(
        head_dims=tuple(_integers("head_dim", FLAGS.head_dim)),
        ffn_step=FLAGS.ffn_step,
        ffn_band=FLAGS.ffn_band,
        tolerance=spread / (2 + spread),  # to each side: then no two shapes are further apart than `spread`
    )
    given = "depth" if FLAGS.depth else "width"
    shapes = [
        solve(config.model, budget, target, length=length, rules=rules, latency=latency, **{given: size})
        for size in _integers(given, FLAGS.depth or FLAGS.width)
    ]
    costs = [accounting.budgets(shape.config, length, rows, latency) for shape in shapes]
    print(table(shapes, costs))
    matched = [cost[budget] for cost in costs]
    designs = {f"{shape.config.depth} x {shape.config.width}": shape.config for shape in shapes}
    for line in named.notes(designs, length) if named else ():
        print(line)
    print(f"\n{budget} differs by {max(matched) / min(matched) - 1:.2%} over these shapes\n\n{paste(shapes)}")
    return 0


def parse_budget(text: str | None) -> tuple[str, float]:
    """Name and value of "<name>:<value>"; the value may have "_" and one of the units k, M, B and G.

    Raises:
      UserError: it has another form, there is no such budget, or the value is not positive.
    """
    name, _, value = (text or "").partition(":")
    if name not in BUDGETS:
        raise UserError(f"--budget={text or ''}: expected <name>:<value> with a name of {', '.join(BUDGETS)}")
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([kmbg]?)", value.lower())
    number = float(match[1]) * _UNITS[match[2]] if match else 0
    if not number:
        raise UserError(
            f"--budget={text}: {value!r} is not a positive number such as 110_000, 110k, 125M or 1.5B"
        )
    return name, number


def _integers(flag: str, words: Sequence[str]) -> list[int]:
    for word in words:
        if not re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", word):
            raise UserError(f"--{flag}={','.join(words)}: {word!r} is not an integer of at least 1")
    return [int(word) for word in words]


def table(shapes: Sequence[Shape], costs: Sequence[dict[str, int | float]]) -> str:
    """Fields, budgets and mismatch, a column for each shape."""
    rows = [[name, *(f"{shape.fields[name]:,}" for shape in shapes)] for name in shapes[0].fields]
    rows += [[name, *(shown(cost[name]) for cost in costs)] for name in costs[0]]
    rows.append(["mismatch to the target", *(f"{shape.mismatch:+.2%}" for shape in shapes)])
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join([row[0].ljust(name_width), *map(str.rjust, row[1:], widths)]) for row in rows)


def paste(shapes: Sequence[Shape]) -> str:
    """The points of these shapes for the `sweep` of a config."""
    rows = {name: tuple(shape.fields[name] for shape in shapes) for name in shapes[0].fields}
    lines = [f"    model__{name}={values}," for name, values in rows.items()]
    return "\n".join(["yield from base.zipped(", *lines, ")"])


if __name__ == "__main__":
    cli.run(main, default_config="configs/base.py", define_flags=define_flags)
