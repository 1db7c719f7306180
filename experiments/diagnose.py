"""Say what each layer of a trained or imported model does, and whether the model uses its depth.

  python -m experiments.diagnose --workdir=runs/first
  python -m experiments.diagnose --workdir=runs/smollm2 --text='files:corpus/**/*.txt'

A line for each layer applied, in nats per token of the held-out rows:

  skipped   what the loss rises by without it, a plan without this place
  cost      the same, but for uses of one block in a row: what the j-th use adds to the j - 1 before it
  swapped   what the loss rises by where this layer and the next one are exchanged
  lens      the loss where the output of this layer goes through the final norm and the head at once
  cosine    of the layer's input and output: 1 where it does nothing
  distance  mean distance t - s that attention looks back, over heads (least and most), in tokens

The effective depth is a participation ratio of the costs (`mobilellm_jax/analysis/layers.py`), with a 95 %
interval over held-out documents, or rows where there are no documents. All of it is added to the run's
record, and drawn in diagnostics.png in its directory. For an imported run, which has no held-out rows, --text
names what to score; then, and with any other --text, results go to diagnostics.json in that directory.
"""

import jax
from absl import flags

from experiments import cli
from experiments.reporting import drawing, layers
from experiments.runner.diagnosing import Entry, diagnose_run, results_path
from experiments.runner.rows import on_this_machine, rows_to_score
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import enable_compilation_cache
from mobilellm_jax.storage.files import write_atomically

FLAGS = flags.FLAGS
_WIDTHS = 5, 5, 9, 9, 9, 8, 7, 24


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("text", None, "text to score: bundled, files:<glob>, tokens:<glob> or tfds:<name>")
    flags.DEFINE_string("text_field", "text", "field that holds the text in jsonl files and TFDS")


def main() -> int:
    """Diagnoses, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name a run, such as --workdir=runs/first")
    workdir = cli.directory("workdir", FLAGS.workdir)
    config, params = open_run(workdir)
    config = on_this_machine(config)
    batches = rows_to_score(FLAGS.text, FLAGS.text_field, workdir, config)
    enable_compilation_cache()
    path, figure = results_path(workdir, FLAGS.text), workdir / "diagnostics.png"
    entry = diagnose_run(path, workdir, config, params, batches, FLAGS.text)
    print("\n".join(lines(entry)))
    if jax.process_index() == 0:
        write_atomically(figure, drawing.render(layers.draw_run(entry, str(workdir))))
    print(f"see {path} and {figure}")
    return 0


def lines(entry: Entry) -> list[str]:
    """The result as a table."""
    plan, full, lens = entry["plan"], entry["loss"], entry["lens"]
    said = [f"{entry['text']}: {entry['targets']:,} tokens, {full:.5f} nats per token"]
    said.append(_line("layer", "block", "skipped", "cost", "swapped", "lens", "cosine", "distance"))
    said.append(_line("", "", "", "", "", f"{lens[0]:.4f}", "", ""))
    for place, u in enumerate(plan):
        distances = entry["distance"][place]
        said.append(
            _line(
                str(place + 1),
                str(u),
                f"{entry['skipped'][place] - full:+.4f}",
                f"{entry['costs'][place]:+.4f}",
                f"{entry['swapped'][place] - full:+.4f}" if place + 1 < len(plan) else "",
                f"{lens[place + 1]:.4f}",
                f"{entry['cosine'][place]:.4f}",
                f"{sum(distances) / len(distances):.1f} ({min(distances):.1f} to {max(distances):.1f})",
            )
        )
    for u, loss in enumerate(entry["without"]):
        if loss is not None:
            said.append(f"without all uses of block {u}: {loss - full:+.4f}")
    depth = entry["effective_depth"]
    over = "no interval over one" if depth["low"] is None else _interval(entry)
    said.append(f"effective depth {depth['value']:.2f} of {len(plan)} layers ({over})")
    return said


def _line(*cells: str) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _interval(entry: Entry) -> str:
    of = entry["effective_depth"]
    return f"95 % interval {of['low']:.2f} to {of['high']:.2f} over {of['units']:,} {entry['units']}"


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
