"""One run = one JSON record. Tables, figures and verdicts are made from records alone, without jax."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.config import SHOWN, flatten
from mobilellm_jax.costs.latency import TIMES
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import files_below, locked, path_of, write_atomically
from mobilellm_jax.storage.sealed import parse, seal, unseal_if_sealed
from mobilellm_jax.validation import from_mapping

SCHEMA = 2
Scalar = bool | int | float | str | None
# {"step", "loss" (nats per token), "bits_per_byte", "error" (share of rows that are not all right)}, and of a
# task what it measures, by name. None: the number was not finite, or does not apply to the data.
Evaluation = dict[str, int | float | None]
_EVALUATION = ("step", "loss", "bits_per_byte", "error")
# Not in older records.
_LATER = (
    *("zero_shot", "design", "arm", "plan", "by_position", "documents", "floor", "measures", "quantized"),
    *("parent", "diagnostics", "loops", "teacher", "calls", "instructions", "samples", "latency"),
    "trials_together",
)
LAYERS = "layers"  # name of the entry in `Record.diagnostics`
_KEYS = {  # required keys of nested fields
    "x": ("label", "value", "log"),
    "parameters": ("total", "embedding", "non_embedding"),
    "budgets": ("total_parameters", "non_embedding_parameters", "train_flops_per_token"),
    "final": _EVALUATION,
    "best": _EVALUATION,
    "timing": ("wall_s", "compile_s", "train_s", "tokens_per_second"),
    "device": ("platform", "kind", "count"),
    "plan": ("seeds", "pairs", "sd", "power", "control"),
    "by_position": ("to", "loss", "targets"),
    "documents": ("nats", "targets"),
    "floor": ("tokens", "unigram", "bigram", "trigram"),
    "measures": ("floor", "ceiling", "levels"),
    "parent": ("run", "step", "manifest_sha256"),
    "teacher": ("run", "step", "manifest_sha256", "flops_per_token"),
    "latency": ("table", "sha256", "device", "median_error", *TIMES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The record of one run, from which alone tables, figures and verdicts are made.

    Attributes:
      schema: version of this layout.
      study, preset: which study, at which size.
      point, point_index: readable label of the design point, and its place in the study's order.
      seed: runs of different points with equal seeds are paired.
      phase: "tuning" for a run of the learning-rate search, "comparison" for one that is compared.
      question: question of the study, one sentence.
      matched: which of the `budgets` is held equal over the points.
      scientific, nuisance: dotted names of the fields that the question is about, and of those tuned for each
        point so that they do not decide it; all others are fixed.
      tuning: where the learning rate comes from: "fitted", the minimum of a parabola through the losses of
        each point's grid; "grid", the best of that grid; "transferred" from another shape by the
        parameterization; or "none": one for all points, as given.
      metric: the compared key of the evaluations, one of `measures.MEASURES`; lower is better.
      pairs: [point, other] for every requested comparison that names this point; in older records for all
        points. `facts.pairs_of` merges those of a study: the family that is decided together.
      margin: the smallest difference in `metric` that matters.
      x: {"label", "value", "log"}, the place on the figure's x axis, and "series" where there are several
        lines; None draws the points as categories.
      status, error: how the run ended, and the message if it did not finish.
      overrides: dotted fields that make this point differ from the study's config.
      config: the whole validated config, nested.
      layer_plan: block index of every layer applied.
      parameters: counts by part, from the config.
      budgets: costs of the shape, from the config alone, see `accounting.budgets`.
      data: data card; every key that ends in "sha256" must agree before runs are compared.
      steps, tokens_seen: optimizer steps and training tokens done.
      final, best: last and lowest held-out evaluation; None when there was none.
      evaluations: all held-out evaluations, in order of step.
      train_curve: [step, training loss], at most 200 points.
      timing: seconds, and training tokens per second.
      git_commit: of the code, with "-dirty" if Python files are modified; None outside a checkout.
      versions, device: versions of Python and libraries; device of the run.
      command, created: command that repeats the run; when it ended (ISO 8601, UTC).
      zero_shot: task scores by name, as `experiments.evaluate` prints them.
      design, arm: label of the architecture, and the parameterization that it was run under, where the study
        has several; `point` names both. Pairs are always within one arm.
      plan: what was decided before the first run: {"seeds", "pairs" (of the arm), "sd" (expected over seeds;
        None if not known), "power" (probability that a pair of equal designs is shown to lie within the
        margin; None with `sd`), "control" (true: outside the matched budget on purpose)}.
      by_position: final held-out loss by place in the row: {"to": last position of each bin, counted from 1,
        "loss" (nats per token), "targets"}.
      documents: final held-out sums by document: {"nats", "targets"}; neighbours are joined where there are
        more than 500.
      floor: held-out loss of n-grams counted on the rows that the run was trained on: {"tokens", "unigram",
        "bigram", "trigram" (nats per token)}; None where it was not counted, as of very many tokens.
      measures: of a task: {"floor" (by name of a measure, its value where nothing was learned), "ceiling"
        (its best value), "levels": {"name", "level", "accuracy", "floor", "ceiling", "answers"}, lists by
        level of difficulty, or None without levels}. The measures themselves are in `evaluations`.
      quantized: cost of quantization by scheme, as `experiments.quantize` prints it: {"loss", "gap",
        "full_loss" (nats per token), "bytes", "full_bytes", "agreement" (share of equal greedy tokens), ...}.
      parent: run that this one began from, see `runs.lineage.Parent`.
      diagnostics: {"layers": what the layers do, as `experiments.diagnose` prints it}, the fields of
        `diagnostics.diagnosis.Diagnosis`.
      loops: held-out scores by number of loops, as `experiments.evaluate --num_repeats` prints them: an
        `Evaluation`, "levels" as in `measures`, "layers" applied, "trained" (number in training), ...
      teacher: run that this one learned from, see `runs.teacher.Teacher`, and the FLOPs of its forward pass.
      calls: scores of API calls by split, as `experiments.evaluate --calls` prints them.
      instructions: shares of instructions kept by rule, as `experiments.evaluate --instructions` prints them.
      samples: by prompt, the text that the run continued it with, as `experiments.sweep --sample` keeps it:
        {"text", "temperature", "seed", ...}.
      latency: milliseconds predicted from a table of `experiments.latency`: {"table" (its file), "sha256",
        "device", "weights", "median_error" (by time, of shapes that it was not fitted to), "decode_ms",
        "prefill_ms"}, the latter two as in `accounting.budgets`.

      trials_together: number of runs in the program that it was trained in, whose `timing` is that of all;
        None: it was alone.

    The fields from `zero_shot` on are None where they do not apply, and in records older than the field.
    """

    schema: int = SCHEMA
    study: str
    preset: str
    point: str
    point_index: int
    seed: int
    phase: Literal["tuning", "comparison"]
    question: str
    matched: str
    scientific: list[str]
    nuisance: list[str]
    tuning: Literal["fitted", "grid", "transferred", "none"]
    metric: str
    pairs: list[list[str]]
    margin: float
    x: dict[str, Any] | None
    status: Literal["finished", "diverged", "failed"]
    error: str | None
    overrides: dict[str, Scalar]
    config: dict[str, dict[str, Any]]
    layer_plan: list[int]
    parameters: dict[str, int]
    budgets: dict[str, int | float]
    data: dict[str, Any]
    steps: int
    tokens_seen: int
    final: Evaluation | None
    best: Evaluation | None
    evaluations: list[Evaluation]
    train_curve: list[list[int | float | None]]
    timing: dict[str, int | float | None]
    git_commit: str | None
    versions: dict[str, str]
    device: dict[str, str | int]
    command: str
    created: str
    zero_shot: dict[str, dict[str, Any]] | None = None
    design: str | None = None
    arm: str | None = None
    plan: dict[str, Any] | None = None
    by_position: dict[str, list[Any]] | None = None
    documents: dict[str, list[Any]] | None = None
    floor: dict[str, int | float] | None = None
    measures: dict[str, Any] | None = None
    quantized: dict[str, dict[str, Any]] | None = None
    parent: dict[str, Any] | None = None
    diagnostics: dict[str, dict[str, Any]] | None = None
    loops: dict[str, dict[str, Any]] | None = None
    samples: dict[str, dict[str, Any]] | None = None
    teacher: dict[str, Any] | None = None
    calls: dict[str, dict[str, Any]] | None = None
    instructions: dict[str, dict[str, Any]] | None = None
    latency: dict[str, Any] | None = None
    trials_together: int | None = None

    @property
    def name(self) -> str:
        """Point and seed, for messages."""
        return f"{self.point!r} seed {self.seed}"

    @property
    def device_name(self) -> str:
        return "{count} x {kind} ({platform})".format(**self.device)

    @property
    def costs(self) -> dict[str, int | float]:
        """The `budgets`, with those of `latency`."""
        return {**self.budgets, **({time: self.latency[time] for time in TIMES} if self.latency else {})}

    @property
    def train_flops_per_token(self) -> float:
        """FLOPs per token of training, those of a teacher included."""
        taught = self.teacher["flops_per_token"] if self.teacher else 0.0
        return self.budgets["train_flops_per_token"] + taught

    @property
    def own_train_s(self) -> float:
        """Seconds in training steps, divided by the runs that trained together; 0 if there was no step."""
        return (self.timing["train_s"] or 0.0) / (self.trials_together or 1)

    @property
    def score(self) -> float:
        """Final held-out value of `metric` of a finished run; lower is better."""
        return self._final(self.metric)

    @property
    def loss(self) -> float:
        """Final held-out loss of a finished run, nats per token."""
        return self._final("loss")

    def _final(self, name: str) -> float:
        value = self.final.get(name) if self.final else None
        if self.status != "finished" or value is None:
            raise ValueError(f"{self.name} did not finish")
        return float(value)

    @property
    def learning_rate(self) -> float:
        return float(self.setting("optimizer.learning_rate"))

    def setting(self, name: str) -> Any:
        """Value of a dotted config field, such as "model.depth"."""
        group, field = name.split(".")
        return self.config[group][field]


def write_record(record: Record, path: str | os.PathLike[str]) -> None:
    """Writes `record` to `path` atomically: a reader sees the old file or the new one, never a part.

    NaN and infinite numbers become null.

    Raises:
      UserError: a field is of the wrong type, or the file cannot be written; the old file is unchanged.
    """
    fields = _finite(dataclasses.asdict(record))
    for name in _LATER:
        if fields[name] is None:
            del fields[name]
    _validated(fields, str(path))
    text = json.dumps(seal(fields), indent=2, sort_keys=True, allow_nan=False)
    # Lists of numbers go on one line. A JSON string holds no raw newline, so the pattern matches none.
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
    write_atomically(path, (text + "\n").encode())


def read_record(path: str | os.PathLike[str]) -> Record:
    """Reads a record.

    Raises:
      UserError: the file is missing, not JSON or of another schema, or a field is missing, unknown, of the
        wrong type or not finite; the message names the file and the field. Or the checksum does not match;
        older records have none.
    """
    try:
        fields = unseal_if_sealed(parse(path_of(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # ValueError: broken JSON or UTF-8, or a checksum mismatch
        raise UserError(
            f"{path}: not a readable JSON record: {error}; restore the file, or delete it and run "
            "its command again"
        ) from None
    return _validated(fields, str(path))


def add_entry(path: str | os.PathLike[str], field: str, name: str, entry: dict[str, Any]) -> None:
    """Adds an entry to a field of the record at `path`: "zero_shot" (by task), "quantized" (by scheme), ...

    Atomically, and where several processes add entries, none is lost; errors as in `read_record`,
    `write_record`.
    """
    with locked(path):
        record = read_record(path)
        entries = {**(getattr(record, field) or {}), name: entry}
        write_record(dataclasses.replace(record, **{field: entries}), path)


def read_records(directory: str | os.PathLike[str]) -> list[Record]:
    """Reads every `*.json` below `directory`, by study, preset, point, seed. Errors as in `read_record`."""
    records = [read_record(path) for path in files_below(path_of(directory)) if path.suffix == ".json"]
    return sorted(records, key=lambda r: (r.study, r.preset, r.point_index, r.point, r.seed))


def by_study(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Groups records by (study, preset), in order of first appearance."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.study, record.preset), []).append(record)
    return groups


def _finite(value: Any) -> Any:
    """Converts `value` to JSON types, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _validated(fields: Any, where: str) -> Record:
    """Builds the record of `fields`. Raises UserError unless they fit this schema."""

    def require(ok: bool, field: str, reason: str) -> None:
        if not ok:
            raise UserError(f"{where}: {field}: {reason}")

    known = isinstance(fields, dict) and "schema" in fields
    require(known, "schema", "the field is missing; this is not a record of a run")
    require(fields["schema"] == SCHEMA, "schema", f"version {fields['schema']!r} is unknown; known: {SCHEMA}")
    record = from_mapping(Record, fields, f"{where}: ")
    required = [(name, fields[name], keys) for name, keys in _KEYS.items() if fields.get(name) is not None]
    required += [(f"evaluations[{i}]", item, _EVALUATION) for i, item in enumerate(fields["evaluations"])]
    for name, values, keys in required:
        for key in keys:
            require(key in values, f"{name}.{key}", "the field is missing")
    missing = SHOWN - flatten(fields["config"]).keys()
    require(not missing, f"config.{min(missing, default='')}", "the field is missing")
    x, finished = fields["x"], fields["status"] == "finished"
    require(x is None or type(x["value"]) in (int, float), "x.value", "not a number")
    require(x is None or x["value"] > 0 or not x["log"], "x.value", "not positive, on a logarithmic axis")
    pairs = all(len(pair) == 2 for pair in fields["train_curve"])
    require(pairs, "train_curve", "expected pairs [step, loss]")
    metric = fields["metric"]
    require(metric in MEASURES, "metric", f"{metric!r} is unknown; known: {', '.join(MEASURES)}")
    has_score = fields["final"] is not None and fields["final"].get(metric) is not None
    require(has_score or not finished, f"final.{metric}", "missing from a finished run")
    require(all(len(pair) == 2 for pair in fields["pairs"]), "pairs", "expected pairs [point, other]")
    for name in ("source_sha256", "tokenizer_sha256"):
        require(name in fields["data"] or not finished, f"data.{name}", "missing from a finished run")
    require(fields["status"] != "failed" or bool(fields["error"]), "error", "missing from a failed run")
    return record


def budget_name(key: str) -> str:
    """Readable name of a key of `Record.budgets`: "non_embedding_parameters", "non-embedding parameters"."""
    return key.replace("non_", "non-").replace("_", " ").replace("kv", "key/value").replace("flops", "FLOPs")


def span(numbers: Iterable[int | float], show: Callable[[float], str]) -> str:
    """Smallest and largest number, "3.10 to 3.25"; one alone if both are shown alike."""
    ordered = sorted(numbers)
    return " to ".join(dict.fromkeys(map(show, (ordered[0], ordered[-1]))))
