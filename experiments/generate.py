"""Continue texts with a trained or imported model.

  python -m experiments.generate --workdir=runs/first --prompt='The list'
  python -m experiments.generate --workdir=runs/first --prompt=One --prompt=Two --temperature=0.8 --top_p=0.95
  python -m experiments.generate --workdir=runs/first --prompt_ids=0,403 --max_new_tokens=20 --print_ids
  python -m experiments.generate --workdir=runs/looped --prompt='The list' --num_repeats=4
  python -m experiments.generate --workdir=runs/looped --prompt='The list' --exit_above=0.9
  python -m experiments.generate --workdir=runs/first

The last line asks for prompts until Ctrl-D; Ctrl-C ends a text. Its prompts draw as those of one batch would:
the first as a single --prompt, each one after it anew. With --exit_above, the most probable token decides
after each loop whether that was the last one. Speeds go to stderr, and so does the number of layers applied.
Reading the prompts and compiling is not part of the speed of decoding.
"""

import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments import cli
from experiments.runner import sampling
from mobilellm_jax import data
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import Generator, TextStream
from mobilellm_jax.loops import with_repeats
from mobilellm_jax.runs.directory import begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import enable_compilation_cache
from mobilellm_jax.training import signals

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_multi_string(
        "prompt", [], "text to continue, after BOS where the model's training put it. Several make a batch"
    )
    flags.DEFINE_multi_string(
        "prompt_ids", [], "or token ids to continue, as they are, such as 1,403; several make a batch"
    )
    sampling.define_flags()
    flags.DEFINE_integer(
        "num_repeats", None, "times each block is applied; else as in training", lower_bound=1
    )
    flags.DEFINE_float(
        "exit_above",
        None,
        "leave out further loops, or layers where none repeats, once a token is more probable than this",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_bool("print_ids", False, "print ids, those of the prompt included, and no text")


def main() -> int:
    """Generates, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name a run, such as --workdir=runs/first")
    asked = sampling.asked()
    if not (FLAGS.prompt or FLAGS.prompt_ids or sys.stdin.isatty()):
        raise UserError("--prompt: missing; give a text to continue, such as --prompt='Once upon a time'")
    given_ids = [_token_ids(text) for text in FLAGS.prompt_ids]
    workdir = cli.directory("workdir", FLAGS.workdir)
    config, params = open_run(workdir)
    shape = config.model
    if FLAGS.num_repeats is not None:
        shape = with_repeats(shape, FLAGS.num_repeats)
    tokenizer = open_tokenizer(workdir)
    if tokenizer is None and not (FLAGS.print_ids and given_ids and not FLAGS.prompt):
        raise UserError(f"{workdir}: this run has no tokenizer; use --prompt_ids together with --print_ids")
    add_bos = tokenizer is not None and begins_with_bos(workdir, tokenizer)
    prompts = [*_encode(FLAGS.prompt, tokenizer, add_bos), *given_ids]
    enable_compilation_cache()
    context = sampling.context(config)
    generator = Generator(params, shape, asked, context, FLAGS.exit_above)
    if prompts:
        _answer(generator, prompts, tokenizer)
    else:
        size = f"{accounting.parameters(shape).total:,}"
        print(f"{workdir}: {size} parameters, {context} tokens of context", file=sys.stderr)
        print("Ctrl-C ends a text, Ctrl-D the conversation.", file=sys.stderr)
        _converse(generator, tokenizer, add_bos)
    return 0


def _token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--prompt_ids: {text!r} is not valid; expected token ids such as 1,403") from None


def _encode(texts: Sequence[str], tokenizer: data.Tokenizer | None, add_bos: bool) -> list[list[int]]:
    if not texts or tokenizer is None:
        return []
    if "" in texts:
        begin = tokenizer.bos_id
        hint = f"; --prompt_ids={begin} begins a document" if begin is not None else ""
        raise UserError(f"--prompt: is empty{hint}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes that the shell passed on
            raise UserError(f"--prompt: {text!r} is not UTF-8") from None
    before = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    return [before + ids for ids in tokenizer.encode_batch(list(texts))]


def _converse(generator: Generator, tokenizer: data.Tokenizer | None, add_bos: bool) -> None:
    """Continues prompts from the terminal, each by itself, until Ctrl-D."""
    import readline  # noqa: F401, line editing for `input`
    import termios

    place = 0
    settings = termios.tcgetattr(sys.stdin)  # `input` changes them while it waits
    signals.before_end["terminal"] = lambda: termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
    while True:
        try:
            text = input("prompt> ")
        except EOFError:
            print()
            return
        if text:
            with signals.noted_signals() as received:
                try:
                    _answer(generator, _encode([text], tokenizer, add_bos), tokenizer, place, received)
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
            if received and set(received) != {"SIGINT"}:
                raise signals.stopped(received, "in an answer")
            place += 1
            received.clear()  # Ctrl-C ends the answer, not the conversation


def _answer(
    generator: Generator,
    prompts: list[list[int]],
    tokenizer: data.Tokenizer | None,
    place: int = 0,
    received: Sequence[str] = (),
) -> None:
    """Prints prompts and what comes after them: one as it is made, and the next once that has ended.

    Stops early where a signal was `received`.
    """
    eos_id = tokenizer.eos_id if tokenizer else None
    steps = generator.start(prompts, FLAGS.max_new_tokens, eos_id, FLAGS.seed, place)
    outputs = [_Output(prompt, tokenizer) for prompt in prompts]
    before = len(generator.layers_applied)
    turn, start, first = 0, time.perf_counter(), None
    for ids in steps:
        first = first or time.perf_counter()
        for output, token in zip(outputs, ids, strict=True):
            output.add(token)
        outputs[turn].print()
        while outputs[turn].ended and turn + 1 < len(outputs):
            turn += 1
            print("" if FLAGS.print_ids else "\n---")
            outputs[turn].print()
        if received:
            break
    end = time.perf_counter()
    for number, output in enumerate(outputs[turn:]):
        if number > 0:
            print("" if FLAGS.print_ids else "\n---")
        output.add(None)
        output.print()
    print()
    read, made = sum(map(len, prompts)), sum(output.made for output in outputs)
    assert first is not None  # there is at least one step
    _say_speed("prefill", read, first - start)
    _say_speed("decode", made - len(prompts), end - first)  # prefill made the first of each
    if applied := generator.layers_applied[before:]:
        mean, most = sum(applied) / len(applied), generator.config.effective_depth
        print(f"layers: {mean:.1f} of {most} in the mean of {len(applied)} tokens", file=sys.stderr)


class _Output:
    """What is to be printed for one prompt."""

    def __init__(self, prompt: Sequence[int], tokenizer: data.Tokenizer | None) -> None:
        self._stream = TextStream(tokenizer) if tokenizer and not FLAGS.print_ids else None
        self._pending, self.ended = "", False
        if self._stream:
            self._pending = "".join(map(self._stream.add, prompt))
        else:
            self._pending = ",".join(map(str, prompt))
        self.made = 0

    def add(self, token: int | None) -> None:
        """Takes the next token, or None where the text has ended."""
        if token is not None:
            self.made += 1
            self._pending += self._stream.add(token) if self._stream else f",{token}"
        elif not self.ended:
            self.ended = True
            self._pending += self._stream.finish() if self._stream else ""

    def print(self) -> None:
        """Prints what was not printed yet."""
        print(self._pending, end="", flush=True)
        self._pending = ""


def _say_speed(what: str, tokens: int, seconds: float) -> None:
    if tokens:
        rate = f"{tokens / seconds:,.0f} tokens/s"
        print(f"{what}: {tokens:,} tokens in {1000 * seconds:,.1f} ms, {rate}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
