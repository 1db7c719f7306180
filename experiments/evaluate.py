"""Score a trained or imported model.

  python -m experiments.evaluate --workdir=runs/first --text='files:corpus/**/*.txt'
  python -m experiments.evaluate --workdir=runs/first --tasks=mobilellm --data_dir=eval
  python -m experiments.evaluate --workdir=runs/first --tasks=arc_easy,triviaqa,race,lambada_openai
  python -m experiments.evaluate --workdir=runs/calls --calls=combinations,values,wordings:500
  python -m experiments.evaluate --workdir=runs/chat --instructions=all

Perplexity and bits per byte of a text, cut into rows of data.sequence_length tokens like the held-out rows
of training: the first tokens of a row are predicted from little. A document ends with EOS, and begins with
BOS as in the model's training: for an imported model, if its tokenizer puts one there.
Bits per byte compare models with different tokenizers, perplexities do not.

Zero-shot accuracy by EleutherAI's lm-evaluation-harness, which is an extra: pip install -e '.[eval]'.
`mobilellm` stands for the paper's eight tasks. Without --data_dir, questions come from the hub, and every
task of lm-eval can be asked. A local file is <task>*.jsonl, such as arc_easy_test.jsonl (also .gz, .xz, .zst;
the formats are in mobilellm_jax/inference/local_tasks.py). Results are added to the run's record; where there
is none, as of an imported run, to zero_shot.json in its directory.

API calls after true conversations, decoded greedily: the splits of mobilellm_jax/data/api_calls.py, or files
as conversations:<glob>, each with :<number> for so many. Counted are JSON, intent, names of slots and whole
calls, and ROUGE of the replies (mobilellm_jax/inference/calls.py); kept as scores of tasks are, or in
calls.json.

Instructions that a program can check (mobilellm_jax/inference/instructions.py): all, or names of rules, the
last with :<number> for so many prompts of each. Printed are the shares of replies that keep them, and words
of a reply, empty replies and repeated words; kept in the same way, or in instructions.json.
"""

import dataclasses
import math

import jax
from absl import flags

from experiments import cli
from experiments.runner.calling import asked_calls, score_calls, score_instructions
from experiments.runner.flags import asked_questions, define_scoring
from experiments.runner.scoring import score_tasks
from mobilellm_jax import data
from mobilellm_jax.config import Config, MeshConfig
from mobilellm_jax.data.text import read_text
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import instructions
from mobilellm_jax.model.stack import Params
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.directory import begins_with_bos, open_run, open_tokenizer
from mobilellm_jax.runs.run import check, enable_compilation_cache
from mobilellm_jax.training.held_out import evaluate_batches
from mobilellm_jax.training.programs import make_programs

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("text", None, "text to score: bundled, files:<glob> or tfds:<name>")
    flags.DEFINE_string("text_field", "text", "field that holds the text in jsonl files and TFDS")
    flags.DEFINE_list(
        "calls",
        [],
        "API calls to ask for: combinations, values, wordings, conversations:<glob>; with :<number> so many "
        "conversations",
    )
    flags.DEFINE_list(
        "instructions", [], "rules to follow: all, or names; the last with :<number> of prompts"
    )
    flags.DEFINE_bool("bos", None, "begin texts of --tasks with BOS; by default as in the model's training")
    flags.DEFINE_integer("batch_size", None, "rows at a time; else as in training")
    flags.DEFINE_list(
        "mesh",
        ["-1", "1", "1"],
        "sizes of the axes data,fsdp,tensor; by default every device holds all weights",
    )
    define_scoring()


def main() -> int:
    """Evaluates, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name a run, such as --workdir=runs/first")
    if not (FLAGS.text or FLAGS.tasks or FLAGS.calls or FLAGS.instructions):
        raise UserError(
            "--text: missing; name a text to score, such as --text='files:corpus/*.txt', or "
            "--tasks=mobilellm, --calls=combinations,values,wordings, or --instructions=all"
        )
    questions, calls = asked_questions(FLAGS.bos), asked_calls(FLAGS.calls)
    if FLAGS.instructions:
        instructions.parse(FLAGS.instructions)
    workdir = cli.directory("workdir", FLAGS.workdir)
    config, params = open_run(workdir)
    tokenizer = open_tokenizer(workdir)
    if tokenizer is None:
        raise UserError(f"{workdir}: this run has no tokenizer, which all of this needs")
    config = _on_this_machine(config)
    enable_compilation_cache()
    if FLAGS.text:
        _score_text(config, params, tokenizer, FLAGS.text, begins_with_bos(workdir, tokenizer))
    this = workdir, config, params, tokenizer, FLAGS.batch_size or 64
    for line in score_calls(calls, *this) if calls else ():
        print(line, flush=True)
    for line in score_instructions(FLAGS.instructions, *this) if FLAGS.instructions else ():
        print(line, flush=True)
    if questions:
        score_tasks(questions, workdir, config, params, tokenizer, check(config))
    return 0


def _on_this_machine(config: Config) -> Config:
    """The config with the mesh and batch size of this command."""
    try:
        mesh = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), map(int, FLAGS.mesh), strict=True)))
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--mesh={','.join(FLAGS.mesh)}: expected three sizes, such as -1,1,1") from None
    size = FLAGS.batch_size
    if size is None:
        data_size, fsdp_size, _ = partition.mesh_shape(mesh, jax.device_count())
        ways = data_size * fsdp_size
        size = -(-config.train.eval_batch_size // ways) * ways
    sizes = {"batch_size": size, "accumulation_steps": 1, "eval_batch_size": size}
    return dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, **sizes))


def _score_text(config: Config, params: Params, tokenizer: data.Tokenizer, spec: str, add_bos: bool) -> None:
    """Prints the loss, the perplexity and the bits per byte of a text."""
    programs = make_programs(config, check(config))
    text = read_text(spec, FLAGS.text_field, tokenizer, config.data.sequence_length, add_bos)
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, programs.state.params))
    batches = text.batches(config.train.eval_batch_size, jax.process_index(), jax.process_count())
    loss, _ = evaluate_batches(programs, params, batches)
    bits = loss * text.tokens / math.log(2) / text.text_bytes
    print(
        f"{spec}: {loss:.4f} nats per token, perplexity {math.exp(loss):,.3f}, {bits:.4f} bits per byte "
        f"({text.tokens:,} tokens, {text.text_bytes:,} bytes, {text.documents:,} documents)"
    )


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
