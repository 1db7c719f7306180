"""Sample texts of trained runs, for `experiments.sweep`: a reader believes them before a number."""

import datetime
from collections.abc import Sequence

import jax

from experiments.runner.kept import Kept, made_with
from experiments.runner.points import Point
from experiments.runner.progress import finished_records
from experiments.runner.questions import has_tokenizer
from experiments.runner.view import Event, Tell
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.directory import begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.storage.files import AnyPath

_KEPT = Kept("samples", what="the sample texts of a run", again="write")
# The most probable token alone would end in a loop of a few words with a small model.
_TEMPERATURE, _SEED, _MOST = 0.8, 0, 60  # the last in tokens


def check(points: Sequence[Point]) -> None:
    """Raises UserError where a point is not trained on text."""
    for point in points:
        if not has_tokenizer(point.config):
            source = point.config.data.source
            raise UserError(f"--sample: {source} is no text that a model could continue; leave the flag out")


def sample_run(prompts: Sequence[str], path: AnyPath, workdir: AnyPath) -> list[str]:
    """Continues the prompts, keeps the texts in `path` and returns them.

    Raises:
      UserError: the run has no tokenizer, or a prompt leaves no room in a training row.
    """
    _KEPT.check(path)
    config, params = open_run(workdir)
    tokenizer = open_tokenizer(workdir)
    if tokenizer is None:
        raise UserError(f"{workdir}: this run has no tokenizer, which --sample needs")
    bos = [tokenizer.bos_id] if begins_with_bos(workdir, tokenizer) and tokenizer.bos_id is not None else []
    asked = [[*bos, *ids] for ids in tokenizer.encode_batch(list(prompts))]
    context = config.data.sequence_length
    room = context - max(map(len, asked))
    if room < 1:
        raise UserError(f"--sample: a prompt has {context - room} tokens, and a row {context}; shorten it")
    sampling = Sampling(temperature=_TEMPERATURE, top_k=0, top_p=1.0)
    steps = Generator(params, config.model, sampling, context).start(
        asked, min(room, _MOST), tokenizer.eos_id, _SEED
    )
    columns = zip(*steps, strict=True)
    texts = [tokenizer.decode([token for token in column if token is not None]) for column in columns]
    of_run = made_with(workdir, config)  # once, as it hashes the checkpoint
    for prompt, text in zip(prompts, texts, strict=True):
        entry = {
            "text": text,
            "temperature": _TEMPERATURE,
            "seed": _SEED,
            **of_run,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if jax.process_index() == 0:
            _KEPT.add(path, prompt, entry)
    return texts


def lacking(point: Point, workdir: AnyPath, prompts: Sequence[str]) -> int:
    """1 if the first finished comparison run of a point lacks the text of a prompt, else 0."""
    return int(bool(_lacking_prompts(point, workdir, prompts)[1]))


def _lacking_prompts(point: Point, workdir: AnyPath, prompts: Sequence[str]) -> tuple[str, list[str]]:
    for name, record in finished_records(point, workdir).items():
        return name, [prompt for prompt in prompts if prompt not in (record.samples or {})]
    return "", []


def sample_point(point: Point, workdir: AnyPath, tell: Tell, prompts: Sequence[str]) -> None:
    """Has the first finished run of a point continue the prompts that its record lacks."""
    name, todo = processes.of_first(lambda: _lacking_prompts(point, workdir, prompts))
    if todo:
        directory = workdir / "runs" / name
        for prompt, text in zip(todo, sample_run(todo, _KEPT.path(directory), directory), strict=True):
            tell(Event(name, f"{prompt!r} goes on: {text!r}"))
