"""Quantize a trained or imported model, and say what that costs.

  python -m experiments.quantize --workdir=runs/first --schemes=w8a8,w8,w4:32,w3:32
  python -m experiments.quantize --workdir=runs/first --schemes=w8a8 --tasks=mobilellm --data_dir=eval
  python -m experiments.quantize --workdir=runs/smollm2 --schemes=w4:32 --text='files:corpus/**/*.txt'

A scheme is w<bits>[a<bits>][:<group>]: bits of the weights, of the activations that they are multiplied with
(without it, these are not rounded), and how many inputs of an output share a scale (without it, all of them).
w8a8 is the paper's (table 15). All of it is symmetric and min-max, after training, without calibration data;
embedding and head are quantized too.

Printed are the held-out loss and its gap to full precision, the bytes of all weights, and the share of
positions where the most probable next token stays the same. They are computed with rounded float32 numbers,
which gives the logits of integer arithmetic, but not its speed. They are added to the run's record. For an
imported run, which has no held-out rows, --text names what to score; then, and with any other --text,
they go to quantized.json in the run's directory. --tasks asks the quantized models zero-shot tasks as well.
"""

from absl import flags

from experiments import cli
from experiments.runner.flags import asked_questions, define_scoring
from experiments.runner.quantizing import Entry, quantize_run, results_path
from experiments.runner.rows import on_this_machine, rows_to_score
from experiments.runner.schemes import Quantizing, schemes_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import enable_compilation_cache

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_list("schemes", ["w8a8", "w8", "w4:32", "w3:32"], "w<bits>[a<bits>][:<group>], ...")
    flags.DEFINE_bool("short_groups", False, "let the last group of an output be shorter than the others")
    flags.DEFINE_string(
        "text", None, "text to score: bundled, files:<glob>, hub:<name>, tokens:<glob> or tfds:<name>"
    )
    flags.DEFINE_string("text_field", "text", "field that holds the text in jsonl files and TFDS")
    define_scoring()


def main() -> int:
    """Quantizes, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name a run, such as --workdir=runs/first")
    if not FLAGS.schemes:
        raise UserError("--schemes: missing; name some, such as --schemes=w8a8,w4:32")
    asked = Quantizing(schemes_of("schemes", FLAGS.schemes), FLAGS.short_groups, asked_questions())
    workdir = cli.directory("workdir", FLAGS.workdir)
    config, params = open_run(workdir)
    asked.check(config)
    config = on_this_machine(config)
    batches = rows_to_score(FLAGS.text, FLAGS.text_field, workdir, config)
    enable_compilation_cache()
    path = results_path(workdir, FLAGS.text)
    done = quantize_run(asked, path, workdir, config, params, batches, FLAGS.text)
    for place, (scheme, entry) in enumerate(done):
        for line in _lines(scheme.name, entry, place == 0):
            print(line, flush=True)
    print(f"see {path}")
    return 0


def _lines(name: str, entry: Entry, first: bool) -> list[str]:
    lines = []
    if first:
        lines.append(
            f"{entry['text']}: {entry['targets']:,} tokens, full precision {entry['full_loss']:.5f} nats per "
            f"token, {entry['full_bytes']:,} bytes in float32"
        )
        lines.append(f"{'scheme':<9} {'loss':>9} {'gap':>9} {'bytes':>15} {'of full':>8} {'same token':>11}")
    share = entry["bytes"] / entry["full_bytes"]
    lines.append(
        f"{name:<9} {entry['loss']:>9.5f} {entry['gap']:>+9.5f} {entry['bytes']:>15,} {share:>8.1%} "
        f"{entry['agreement']:>11.2%}"
    )
    if entry["short_groups"]:
        lines.append(f"{'':<9} shorter last groups in {', '.join(entry['short_groups'])}")
    for task, scores in entry.get("zero_shot", {}).items():
        values = ", ".join(f"{metric} {100 * of['value']:.1f}" for metric, of in scores["metrics"].items())
        lines.append(f"{'':<9} {task} ({scores['items']:,}): {values}")
    return lines


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
