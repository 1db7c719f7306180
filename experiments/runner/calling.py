"""Scores of a run on API calls and on instructions, for `experiments.evaluate`."""

import dataclasses
import datetime
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.runner.kept import Kept, made_with
from experiments.runner.score_table import percent
from mobilellm_jax import data
from mobilellm_jax.config import Config
from mobilellm_jax.data import api_calls, chat
from mobilellm_jax.data.conversations import read_valid
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.inference import calls, instructions
from mobilellm_jax.inference.generate import GREEDY, Generator
from mobilellm_jax.inference.talk import Speaker
from mobilellm_jax.model.stack import Params
from mobilellm_jax.runs.directory import begins_with_bos
from mobilellm_jax.storage.files import AnyPath

_KEPT = Kept("calls", what="the scores of API calls", again="score")
_KEPT_INSTRUCTIONS = Kept("instructions", what="the scores of instructions", again="score")
results_path = _KEPT.path
_COLUMNS = {"calls": 6, **dict.fromkeys(("json", "intent", "slots", "call"), 11), "replies": 7}
_COLUMNS |= {"rouge1": 11, "rougeL": 11}


@dataclasses.dataclass(frozen=True)
class Asked:
    """Conversations to ask for.

    Attributes:
      name: of a split in `api_calls.SPLITS`, or "conversations:<glob>".
      limit: how many; None for all, and for generated ones as many as in the paper's data.
    """

    name: str
    limit: int | None

    def open(self, config: Config) -> tuple[list[chat.Conversation], dict[str, Any]]:
        """The conversations, and what they are.

        A run on generated conversations is asked such of its own seed and numbers of tasks and intents.
        """
        if self.name.startswith("conversations:"):
            found, settings = read_valid(self.name, "--calls")
            return found[: self.limit], settings
        of_run = config.data.source
        spec = api_calls.parse(of_run if of_run.startswith("api_calls:") else "api_calls:", "data.source")
        spec = dataclasses.replace(spec, split=self.name, conversations=self.limit or 0)
        spec = dataclasses.replace(spec, conversations=spec.count)
        said = ",".join(f"{name}={value}" for name, value in dataclasses.asdict(spec).items())
        return list(api_calls.generate(spec)), {"source": f"api_calls:{said}", "version": api_calls.VERSION}


def asked_calls(items: Sequence[str]) -> tuple[Asked, ...]:
    """What --calls asks for: names, each with :<number> or none; that of the last holds for those without.

    Raises:
      UserError: a name is unknown.
    """
    found = []
    for item in items:
        match = re.fullmatch(r"(.+?)(?::(\d+))?", item)
        name, limit = (match[1], match[2]) if match else (item, None)
        if name not in api_calls.SPLITS and not name.startswith("conversations:"):
            hint = did_you_mean(name, [*api_calls.SPLITS, "conversations:<glob>"])
            raise UserError(f"--calls: {item!r} is not valid; {hint}")
        if limit is not None and int(limit) == 0:
            raise UserError(f"--calls: {item!r}: expected at least 1 conversation")
        found.append(Asked(name, int(limit) if limit else None))
    last = found[-1].limit if found else None
    return tuple(dataclasses.replace(one, limit=one.limit or last) for one in found)


def score_calls(
    asked: Sequence[Asked],
    workdir: AnyPath,
    config: Config,
    params: Params,
    tokenizer: data.Tokenizer,
    batch_size: int,
) -> Iterator[str]:
    """Scores a run on conversations; yields a table line by line, each as soon as its scores are kept.

    Raises:
      UserError: the tokenizer has no EOS, or the conversations cannot be read.
    """
    _check_eos(workdir, tokenizer)
    path, first = results_path(workdir), jax.process_index() == 0
    _KEPT.check(path)
    context, bos = config.data.sequence_length, begins_with_bos(workdir, tokenizer)
    yield _row("conversations", {column: column for column in _COLUMNS})
    shortened = 0
    for one in asked:
        conversations, settings = one.open(config)
        found = calls.score(params, config.model, tokenizer, conversations, context, batch_size, bos)
        shortened += found.shortened
        if first:
            settings = {**settings, "limit": one.limit, **_settings(config, workdir, bos)}
            _KEPT.add(path, one.name, {**entry(found), **settings})
        cells = {name: percent(*value) for name, value in found.metrics.items()}
        cells |= {"calls": f"{found.calls:,}", "replies": f"{found.replies:,}"}
        yield _row(f"{one.name} ({found.conversations:,})", cells)
    if shortened:
        yield f"{shortened:,} prompts were longer than the context of {context} and lost their first turns"
    yield f"in percent, ± a standard error over conversations; see {path}"


def entry(found: calls.CallScores) -> dict[str, Any]:
    """Scores as they are kept."""
    metrics = {name: {"value": v, "standard_error": e} for name, (v, e) in found.metrics.items()}
    return {**dataclasses.asdict(found), "metrics": metrics}


def score_instructions(
    names: Sequence[str],
    workdir: AnyPath,
    config: Config,
    params: Params,
    tokenizer: data.Tokenizer,
    batch_size: int,
) -> Iterator[str]:
    """Asks a run to follow instructions; as `score_calls`, for what --instructions names."""
    rules, count = instructions.parse(names)
    _check_eos(workdir, tokenizer)
    path = _KEPT_INSTRUCTIONS.path(workdir)
    _KEPT_INSTRUCTIONS.check(path)
    bos = begins_with_bos(workdir, tokenizer)
    generator = Generator(params, config.model, GREEDY, config.data.sequence_length)
    speaker = Speaker(generator, tokenizer, bos)
    yield instructions.HEAD
    for rule in rules:
        found = instructions.follow(speaker, rule, count, batch_size)
        if jax.process_index() == 0:
            _KEPT_INSTRUCTIONS.add(path, rule, {**found, **_settings(config, workdir, bos)})
        yield instructions.line(rule, found)
    yield f"kept: ± a standard error over prompts; a reply that keeps a rule may be nonsense; see {path}"


def _check_eos(workdir: AnyPath, tokenizer: data.Tokenizer) -> None:
    if tokenizer.eos_id is None:
        raise UserError(f"{workdir}: the tokenizer of this run has no EOS, with which replies end")


def _settings(config: Config, workdir: AnyPath, bos: bool) -> dict[str, Any]:
    return {
        "bos": bos,
        "context": config.data.sequence_length,
        **made_with(workdir, config),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _row(name: str, cells: dict[str, str]) -> str:
    padded = itertools.starmap(lambda column, width: cells.get(column, "").rjust(width), _COLUMNS.items())
    return " ".join([name.ljust(24), *padded]).rstrip()
