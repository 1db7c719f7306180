"""Talk with a trained or imported model, or let it answer the questions of a file.

  python -m experiments.chat --workdir=runs/phone
  python -m experiments.chat --workdir=runs/phone --temperature=0.7 --top_p=0.9
  python -m experiments.chat --workdir=runs/phone --questions=question.jsonl --answers=answers/phone.jsonl

On a terminal: /reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C ends a reply. A reply that is JSON
is a call of an API: its result is asked for, and an empty one is "ok". Conversations are in the template of
mobilellm_jax/data/chat.py; a model that was not trained on it can be tried all the same.

Questions are those of MT-bench (question.jsonl of FastChat) or of AlpacaEval, a JSON list or jsonl; answers
are written as the judges of the two read them. Neither judge is here, and none of the figures printed, words
of a reply, empty replies, repeated words, is a judgement. --check only looks at answers that are there.
"""

import contextlib
import sys
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.runner import answering, sampling
from mobilellm_jax.data import chat
from mobilellm_jax.data.tokenizers import TEMPLATE_FILE
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.inference.talk import Speaker, Talk, answers, style
from mobilellm_jax.runs.directory import TOKENIZER, begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import enable_compilation_cache
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training import signals

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("system", "", "a first turn of the system")
    sampling.define_flags()
    flags.DEFINE_string("questions", None, "file of questions to answer, .jsonl or .json")
    flags.DEFINE_string("answers", None, "file to write: .jsonl for MT-bench, .json for AlpacaEval")
    flags.DEFINE_enum("format", None, answering.FORMATS, "of both files; default: that of the questions")
    flags.DEFINE_string("model_id", None, "name of the model in the answers; default: that of the directory")
    flags.DEFINE_integer("batch_size", 16, "questions at a time", 1)
    flags.DEFINE_bool("check", False, "only check that --answers has answers to --questions")


def main() -> int:
    """Talks, and returns the exit status."""
    if bool(FLAGS.questions) != bool(FLAGS.answers):
        lacking = "answers" if FLAGS.questions else "questions"
        raise UserError(f"--{lacking}: missing; --questions and --answers go together")
    if FLAGS.check and FLAGS.questions:
        return _check()
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name a run, such as --workdir=runs/phone")
    asked = sampling.asked()
    if not FLAGS.questions and not sys.stdin.isatty():
        raise UserError("--questions: missing; without a terminal, give a file of questions and --answers")
    questions = answering.read_questions(Path(FLAGS.questions), FLAGS.format) if FLAGS.questions else None
    workdir = cli.directory("workdir", FLAGS.workdir)
    speaker = _speaker(workdir, asked)
    if questions:
        _answer(speaker, *questions, FLAGS.model_id or workdir.absolute().name)
    else:
        _converse(Talk(speaker, FLAGS.system))
    return 0


def _check() -> int:
    form, rows = answering.read_questions(Path(FLAGS.questions), FLAGS.format)
    answering.check_answers(Path(FLAGS.answers), form, rows)
    print(f"{FLAGS.answers}: {len(rows):,} answers in the format {form}")
    return 0


def _speaker(workdir: AnyPath, asked: Sampling) -> Speaker:
    config, params = open_run(workdir)
    tokenizer = open_tokenizer(workdir)
    if tokenizer is None or tokenizer.eos_id is None:
        raise UserError(f"{workdir}: this run has no tokenizer with an EOS, with which replies end")
    template = workdir / TOKENIZER / TEMPLATE_FILE
    if not template.exists():
        print("warning: this model was not trained on conversations", file=sys.stderr)
    elif template.read_text().strip() != chat.TEMPLATE:
        print(f"warning: {template} is another template than ours, which is used here", file=sys.stderr)
    enable_compilation_cache()
    generator = Generator(params, config.model, asked, sampling.context(config))
    bos = begins_with_bos(workdir, tokenizer)
    return Speaker(generator, tokenizer, bos, FLAGS.max_new_tokens, FLAGS.seed)


def _answer(speaker: Speaker, form: str, rows: list[answering.Row], model_id: str) -> None:
    """Writes the answers to all questions, checks the file, and prints figures of style."""
    path = Path(FLAGS.answers)
    asked = [answering.turns_of(form, row) for row in rows]
    replies = answers(speaker, asked, FLAGS.batch_size)
    answering.write_answers(path, form, model_id, rows, replies)
    answering.check_answers(path, form, rows)
    found = style([text for turns in replies for text in turns])
    print(
        f"{sum(map(len, replies)):,} replies: {found['words']:.1f} words on average, {found['empty']:.1%} "
        f"empty, {found['repeated']:.1%} of their triples of words repeated"
    )
    print(f"{len(rows):,} answers in the format {form}; see {path}")


def _converse(talk: Talk) -> None:
    """Talks on the terminal until Ctrl-D."""
    import readline  # noqa: F401, line editing for `input`
    import termios

    settings = termios.tcgetattr(sys.stdin)  # `input` changes them while it waits
    signals.before_end["terminal"] = lambda: termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
    role = "user"
    while True:
        try:
            text = input("you> " if role == "user" else "result> ").strip()
        except EOFError:
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            talk.reset()
            role = "user"
            continue
        if text or role == "result":
            _reply(talk, role, text or "ok")
            role = "result" if talk.turns[-1].role == "call" else "user"


def _reply(talk: Talk, role: str, text: str) -> None:
    """Prints a reply as it is made; Ctrl-C ends it, and not the conversation."""
    with signals.noted_signals() as received:
        with contextlib.closing(talk.say(role, text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                if received:
                    break
        print()
        if received and set(received) != {"SIGINT"}:
            raise signals.stopped(received, "in a reply")
        received.clear()


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
