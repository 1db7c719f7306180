"""Score a trained or imported model.

  python -m experiments.evaluate --workdir=runs/first --text='files:corpus/**/*.txt'
  python -m experiments.evaluate --workdir=runs/first --tasks=mobilellm --data_dir=eval
  python -m experiments.evaluate --workdir=runs/first --tasks=arc_easy,triviaqa,race,lambada_openai
  python -m experiments.evaluate --workdir=runs/looped --num_repeats=1,2,4,8
  python -m experiments.evaluate --workdir=runs/playground/structure_tiny/2-x-38-s0 --strings=1000
  python -m experiments.evaluate --workdir=runs/calls --calls=combinations,values,wordings:500
  python -m experiments.evaluate --workdir=runs/chat --instructions=all

Perplexity and bits per byte of a text, cut into rows of data.sequence_length tokens like the held-out rows
of training: the first tokens of a row are predicted from little. A document ends with EOS, and begins with
BOS as in the model's training: for an imported model, if its tokenizer puts one there.
Bits per byte compare models with different tokenizers, perplexities do not.

--strings draws strings from a model of the task structure, token by token, and says which share of them the
grammar has, by an exact parser.

Zero-shot accuracy by EleutherAI's lm-evaluation-harness, which is an extra: pip install -e '.[eval]'.
`mobilellm` stands for the paper's eight tasks. Without --data_dir, questions come from the hub, and every
task of lm-eval can be asked. A local file is <task>*.jsonl, such as arc_easy_test.jsonl (also .gz, .xz, .zst;
the formats are in mobilellm_jax/inference/local_tasks.py). Results are added to the run's record; where there
is none, as of an imported run, to zero_shot.json in its directory.

--num_repeats scores a model whose blocks are repeated with other numbers of loops than in training: its
held-out rows, and of a synthetic task what it measures, which is added to the run's record; or a --text. The
multiplier of the residual branches stays that of training (`mobilellm_jax/loops.py` says why).
API calls after true conversations, decoded greedily: the splits of mobilellm_jax/data/api_calls.py, or files
as conversations:<glob>, each with :<number> for so many. Counted are JSON, intent, names of slots and whole
calls, and ROUGE of the replies (mobilellm_jax/inference/calls.py); kept as scores of tasks are, or in
calls.json.

Instructions that a program can check (mobilellm_jax/inference/instructions.py): all, or names of rules, the
last with :<number> for so many prompts of each. Printed are the shares of replies that keep them, and words
of a reply, empty replies and repeated words; kept in the same way, or in instructions.json.
"""

import math
from collections.abc import Sequence

import jax
from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.runner import looping
from experiments.runner.calling import asked_calls, score_calls, score_instructions
from experiments.runner.flags import (
    asked_loops,
    asked_questions,
    define_loops,
    define_scoring,
    define_speaking,
)
from experiments.runner.rows import on_this_machine
from experiments.runner.scoring import score_tasks
from mobilellm_jax import data
from mobilellm_jax.analysis.statistics import interval_of_share
from mobilellm_jax.config import Config, MeshConfig
from mobilellm_jax.data.tasks.structure import Structure
from mobilellm_jax.data.text import read_text
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import instructions
from mobilellm_jax.inference.strings import count_parsed, draw_strings
from mobilellm_jax.model.stack import Params
from mobilellm_jax.runs.directory import begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check, enable_compilation_cache
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training.held_out import evaluate_batches
from mobilellm_jax.training.programs import make_programs

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("text", None, "text to score: bundled, files:<glob>, hub:<name> or tfds:<name>")
    flags.DEFINE_string("text_field", "text", "field that holds the text in jsonl files and TFDS")
    flags.DEFINE_integer("strings", None, "of a grammar: strings to draw from the model, and to parse", 1)
    define_speaking()
    flags.DEFINE_bool("bos", None, "begin texts of --tasks with BOS; by default as in the model's training")
    flags.DEFINE_integer("batch_size", None, "rows at a time; else as in training")
    flags.DEFINE_list(
        "mesh",
        ["-1", "1", "1"],
        "sizes of the axes data,fsdp,tensor; by default every device holds all weights",
    )
    define_loops()
    define_scoring()


def main() -> int:
    """Evaluates, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name a run, such as --workdir=runs/first")
    counts, in_words = asked_loops(), FLAGS.tasks or FLAGS.calls or FLAGS.instructions
    if counts and in_words:
        raise UserError(
            "--num_repeats: cannot be combined with --tasks, --calls or --instructions, which ask the model "
            "as it was trained"
        )
    if not (FLAGS.text or in_words or counts or FLAGS.strings):
        raise UserError(
            "--text: missing; name a text to score, such as --text='files:corpus/*.txt', or "
            "--tasks=mobilellm, --calls=combinations,values,wordings, or --instructions=all"
        )
    questions, calls = asked_questions(FLAGS.bos), asked_calls(FLAGS.calls)
    if FLAGS.instructions:
        instructions.parse(FLAGS.instructions)
    workdir = cli.directory("workdir", FLAGS.workdir)
    config, params = open_run(workdir)
    if FLAGS.strings:
        _score_strings(config, params, FLAGS.strings)
    config = on_this_machine(config, _asked_mesh(), FLAGS.batch_size)
    enable_compilation_cache()
    if counts and not FLAGS.text:
        _score_loops(counts, workdir, config, params)
    if not (FLAGS.text or in_words):
        return 0
    tokenizer = open_tokenizer(workdir)
    if tokenizer is None:
        raise UserError(f"{workdir}: this run has no tokenizer, which all of this needs")
    if FLAGS.text:
        looped = {f"num_repeats {n}, ": looping.looped(config, n) for n in counts}
        for name, of in (looped or {"": config}).items():
            _score_text(of, params, tokenizer, FLAGS.text, begins_with_bos(workdir, tokenizer), name)
    this = workdir, config, params, tokenizer, FLAGS.batch_size or 64
    for line in score_calls(calls, *this) if calls else ():
        print(line, flush=True)
    for line in score_instructions(FLAGS.instructions, *this) if FLAGS.instructions else ():
        print(line, flush=True)
    if questions:
        score_tasks(questions, workdir, config, params, tokenizer, check(config))
    return 0


def _asked_mesh() -> MeshConfig:
    """The mesh that --mesh gives; UserError if it is none."""
    try:
        return MeshConfig(**dict(zip(("data", "fsdp", "tensor"), map(int, FLAGS.mesh), strict=True)))
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--mesh={','.join(FLAGS.mesh)}: expected three sizes, such as -1,1,1") from None


def _score_text(
    config: Config, params: Params, tokenizer: data.Tokenizer, spec: str, add_bos: bool, name: str
) -> None:
    """Prints the loss, the perplexity and the bits per byte of a text."""
    programs = make_programs(config, check(config))
    text = read_text(spec, FLAGS.text_field, tokenizer, config.data.sequence_length, add_bos)
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, programs.state.params))
    size = config.train.eval_batch_size
    batches = text.batches(size, jax.process_index(), jax.process_count())
    total = -(-len(text.rows_RS) // size)
    shown = tqdm(batches, f"{name}scoring", total, unit="batch", leave=False, disable=None)  # on a terminal
    loss, _ = evaluate_batches(programs, params, iter(shown))
    bits = loss * text.tokens / math.log(2) / text.text_bytes
    print(
        f"{name}{spec}: {loss:.4f} nats per token, perplexity {math.exp(loss):,.3f}, {bits:.4f} bits per "
        f"byte ({text.tokens:,} tokens, {text.text_bytes:,} bytes, {text.documents:,} documents)"
    )


def _score_loops(counts: Sequence[int], workdir: AnyPath, config: Config, params: Params) -> None:
    """Prints a line for each number of loops, and keeps the scores."""
    path = looping.results_path(workdir)
    done = looping.score_loops(counts, path, workdir, config, params)
    for place, (count, entry) in enumerate(done):
        if place == 0:  # nothing is printed before an error
            print(f"{'loops':>5} {'layers':>6} {'loss':>9}")
        line = f"{count:>5} {entry['layers']:>6} {entry['loss']:>9.5f}"
        if levels := entry["levels"]:
            shares = zip(levels["level"], levels["accuracy"], strict=True)
            line += f"  right by {levels['name']}: " + ", ".join(f"{at}: {100 * s:.1f} %" for at, s in shares)
        print(line + ("  as in training" if count == entry["trained"] else ""), flush=True)
    print(f"see {path}")


def _score_strings(config: Config, params: Params, count: int) -> None:
    """Prints the share of strings drawn from the model that its grammar has.

    Raises:
      UserError: the model was not trained on a grammar.
    """
    prepared = data.prepare(config.data, config.model.vocab_size)
    task = prepared.train if isinstance(prepared, data.TaskData) else None
    if not isinstance(task, Structure):
        raise UserError(
            f"--strings={count}: the run was trained on {config.data.source}, not on structure:..."
        )
    enable_compilation_cache()
    parsed = count_parsed(task, draw_strings(params, config.model, task, count, seed=0))
    low, high = interval_of_share(parsed, count)
    print(
        f"{config.data.source}: {parsed / count:.1%} [{low:.1%}, {high:.1%}] of {count:,} strings drawn from "
        "the model parse"
    )


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
