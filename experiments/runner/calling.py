"""Scores of runs on API calls and on instructions, for `experiments.evaluate` and `experiments.sweep`."""

import dataclasses
import datetime
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.runner.kept import Kept, made_with
from experiments.runner.points import Point
from experiments.runner.progress import finished_records
from experiments.runner.questions import has_tokenizer
from experiments.runner.score_table import percent
from experiments.runner.view import Event, Tell
from mobilellm_jax import data
from mobilellm_jax.config import Config
from mobilellm_jax.data import api_calls, chat
from mobilellm_jax.data.conversations import read_valid
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.inference import calls, instructions
from mobilellm_jax.inference.generate import GREEDY, Generator
from mobilellm_jax.inference.talk import Speaker
from mobilellm_jax.model.stack import Params
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.directory import begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
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


@dataclasses.dataclass(frozen=True)
class Speaking:
    """What the finished runs of a sweep are asked.

    Attributes:
      calls: conversations to ask for.
      rules: of instructions, `prompts` of each.
    """

    calls: tuple[Asked, ...]
    rules: tuple[str, ...]
    prompts: int

    def check(self, config: Config) -> None:
        """Checks that runs of a config have a tokenizer; UserError if they have none."""
        if not has_tokenizer(config):
            raise UserError(
                f"--calls, --instructions: runs on {config.data.source!r} have no tokenizer, which both need"
            )


def asked_speaking(of_calls: Sequence[str], of_instructions: Sequence[str]) -> Speaking | None:
    """What --calls and --instructions ask every run of a sweep for; None without both.

    Raises:
      UserError: a name is unknown.
    """
    if not (of_calls or of_instructions):
        return None
    rules, prompts = instructions.parse(of_instructions) if of_instructions else ((), 0)
    by_name = {one.name: one for one in asked_calls(of_calls)}  # a record has one entry for each
    return Speaking(tuple(by_name.values()), rules, prompts)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run that is asked, and how many prompts at a time."""

    workdir: AnyPath
    config: Config
    params: Params
    tokenizer: data.Tokenizer
    batch_size: int = 64

    @functools.cached_property
    def _made_with(self) -> dict[str, Any]:
        return made_with(self.workdir, self.config)  # once, as it hashes the checkpoint

    def __post_init__(self) -> None:
        if self.tokenizer.eos_id is None:
            raise UserError(f"{self.workdir}: the tokenizer of this run has no EOS, with which replies end")

    @property
    def bos(self) -> bool:
        return begins_with_bos(self.workdir, self.tokenizer)

    def settings(self) -> dict[str, Any]:
        return {
            "bos": self.bos,
            "context": self.config.data.sequence_length,
            **self._made_with,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _scored(of: _Run, asked: Sequence[Asked]) -> Iterator[tuple[Asked, calls.CallScores]]:
    """Yields the scores of each, as soon as they are kept."""
    path, context = results_path(of.workdir), of.config.data.sequence_length
    _KEPT.check(path)
    for one in asked:
        conversations, settings = one.open(of.config)
        found = calls.score(
            of.params, of.config.model, of.tokenizer, conversations, context, of.batch_size, of.bos
        )
        if jax.process_index() == 0:
            _KEPT.add(path, one.name, {**entry(found), **settings, "limit": one.limit, **of.settings()})
        yield one, found


def _followed(of: _Run, rules: Sequence[str], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields how each rule is followed, as soon as it is kept."""
    path = _KEPT_INSTRUCTIONS.path(of.workdir)
    _KEPT_INSTRUCTIONS.check(path)
    generator = Generator(of.params, of.config.model, GREEDY, of.config.data.sequence_length)
    speaker = Speaker(generator, of.tokenizer, of.bos)
    for rule in rules:
        found = instructions.follow(speaker, rule, count, of.batch_size)
        if jax.process_index() == 0:
            _KEPT_INSTRUCTIONS.add(path, rule, {**found, **of.settings()})
        yield rule, found


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
    of, shortened = _Run(workdir, config, params, tokenizer, batch_size), 0
    yield _row("conversations", {column: column for column in _COLUMNS})
    for one, found in _scored(of, asked):
        shortened += found.shortened
        cells = {name: percent(*value) for name, value in found.metrics.items()}
        cells |= {"calls": f"{found.calls:,}", "replies": f"{found.replies:,}"}
        yield _row(f"{one.name} ({found.conversations:,})", cells)
    if shortened:
        context = config.data.sequence_length
        yield f"{shortened:,} prompts were longer than the context of {context} and lost their first turns"
    yield f"in percent, ± a standard error over conversations; see {results_path(workdir)}"


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
    of = _Run(workdir, config, params, tokenizer, batch_size)
    yield instructions.HEAD
    for rule, found in _followed(of, rules, count):
        yield instructions.line(rule, found)
    path = _KEPT_INSTRUCTIONS.path(workdir)
    yield f"kept: ± a standard error over prompts; a reply that keeps a rule may be nonsense; see {path}"


# --- the runs of a sweep --------------------------------------------------------------------------------


def lacking(point: Point, workdir: AnyPath, asked: Speaking) -> int:
    """Number of finished comparison runs of a point whose record lacks some of it."""
    return sum(map(any, _lacking(point, workdir, asked).values()))


def _lacking(point: Point, workdir: AnyPath, asked: Speaking) -> dict[str, list[list[str]]]:
    """Names of the calls, and of the rules, that the record of each finished run lacks, by the run's name.

    An answer to another number of conversations or prompts is not the one asked for.
    """
    found = {}
    for name, record in finished_records(point, workdir).items():
        limits = {call: entry["limit"] for call, entry in (record.calls or {}).items()}
        prompts = {rule: entry["prompts"] for rule, entry in (record.instructions or {}).items()}
        found[name] = [
            [one.name for one in asked.calls if limits.get(one.name, 0) != one.limit],  # 0: not asked
            [rule for rule in asked.rules if prompts.get(rule) != asked.prompts],
        ]
    return found


def ask_point(point: Point, workdir: AnyPath, tell: Tell, asked: Speaking) -> None:
    """Asks every finished run of a point for what its record lacks."""
    todo = processes.of_first(lambda: _lacking(point, workdir, asked))
    for name, (names, rules) in todo.items():
        if not (names or rules):
            continue
        directory = workdir / "runs" / name
        config, params = open_run(directory)
        tokenizer = open_tokenizer(directory)
        assert tokenizer is not None, directory  # `Speaking.check`
        of = _Run(directory, dataclasses.replace(config, mesh=point.config.mesh), params, tokenizer)
        for one, found in _scored(of, [one for one in asked.calls if one.name in names]):
            shares = (f"{metric} {percent(*value)}" for metric, value in found.metrics.items())
            tell(Event(name, f"{one.name}: {', '.join(shares)}"))
        kept = [f"{rule} {found['kept']:.0%}" for rule, found in _followed(of, rules, asked.prompts)]
        if kept:
            tell(Event(name, f"instructions kept: {', '.join(kept)}"))


def _row(name: str, cells: dict[str, str]) -> str:
    padded = itertools.starmap(lambda column, width: cells.get(column, "").rjust(width), _COLUMNS.items())
    return " ".join([name.ljust(24), *padded]).rstrip()
