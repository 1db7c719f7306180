"""The adapter of our models to EleutherAI's lm-evaluation-harness, and the evaluation of its tasks.

Needs the extra `eval`: import this module only where tasks are run.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mobilellm_jax import model
from mobilellm_jax.config import Config
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.inference.likelihood import Request, log_likelihoods
from mobilellm_jax.inference.local_tasks import GROUPS, LOCAL_TASKS, expand, find_file, read_local
from mobilellm_jax.parallel import partition

try:
    import datasets  # pyright: ignore[reportMissingImports]
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise UserError(f"lm-evaluation-harness is missing: run pip install -e '.[eval]' ({error})") from None

MOST_KEPT = 20_000  # questions whose answers are kept one by one
_PROMPTS = 32  # generated from at one time
_NEW_TOKENS = 256  # the default of lm-eval's other models for tasks without a limit
_BOTH = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


class Adapter(TemplateLM):
    """The model interface of lm-eval: `loglikelihood`, `loglikelihood_rolling` and `generate_until`.

    Attributes:
      max_length: most tokens that the model reads: its training sequence length.
      shortened: number of requests so far that were longer and lost their first tokens.
    """

    def __init__(
        self, params: model.Params, config: Config, tokenizer: Tokenizer, mesh: Mesh, add_bos: bool
    ) -> None:
        """Takes float32 parameters; `add_bos` begins every text with BOS, where the tokenizer has one."""
        super().__init__()
        self.max_length = config.data.sequence_length
        self.shortened = 0
        self._params = jax.device_put(params, partition.shardings(params, mesh))
        self._host_params, self._config, self._mesh, self._tokenizer = params, config, mesh, tokenizer
        self._bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        # The choices of one question come one after the other, with the same context.
        self._encode = functools.lru_cache(1024)(lambda text: tokenizer.encode_batch([text])[0])

    @property
    def eot_token_id(self) -> Any:  # declared int in lm-eval, which uses it where there is no prefix_token_id
        """EOS, or None."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token read before a text without context: BOS, else EOS."""
        token = self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id
        if token is None:
            raise UserError(
                f"tokenizer {self._tokenizer.spec!r}: has neither BOS nor EOS, one of "
                "which has to begin a text without context; use a model whose tokenizer has one"
            )
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, BOS first unless `add_special_tokens` is False."""
        return ([] if add_special_tokens is False else self._bos) + self._encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation in nats, and whether greedy decoding gives it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # encoding needs no bar

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        self.shortened += sum(len(pair.context + pair.continuation) > self.max_length + 1 for pair in pairs)
        return log_likelihoods(
            self._params, pairs, self._config.model, self._mesh, self.max_length, progress="log likelihoods"
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of each text in nats; a long one is read in windows."""
        pairs, texts = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append((None, *window))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, (log_p, _) in zip(texts, self._loglikelihood_tokens(pairs), strict=True):
            totals[number] += log_p
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generates text for each prompt up to the first of its stop strings, or to EOS."""
        groups = collections.defaultdict(list)
        for number, request in enumerate(requests):
            context, asked = request.args
            settings: dict[str, Any] = dict(
                normalize_gen_kwargs(asked, min(_NEW_TOKENS, self.max_length // 2))
            )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"max_gen_toks: {settings['max_gen_toks']} new tokens leave no room for a prompt in the "
                    f"context of {self.max_length}; use fewer"
                )
            self.shortened += len(ids) > room
            groups[repr(sorted(settings.items()))].append((ids[-room:], number, settings))
        texts = [""] * len(requests)
        for group in groups.values():
            group.sort(key=lambda entry: len(entry[0]), reverse=True)
            settings = group[0][2]
            draws = settings if settings["temperature"] > 0 else {}  # else top_k and top_p have no effect
            sampling = Sampling(
                temperature=settings["temperature"],
                top_k=draws.get("top_k") or 0,
                top_p=draws.get("top_p", 1.0),
            )
            generator = Generator(self._host_params, self._config.model, sampling, self.max_length)
            for start in range(0, len(group), _PROMPTS):
                batch = group[start : start + _PROMPTS]
                prompts = [ids for ids, *_ in batch]
                found = self._generate(generator, prompts, settings["max_gen_toks"], settings["until"])
                for (_, number, _), text in zip(batch, found, strict=True):
                    texts[number] = text
        return texts

    def _generate(
        self, generator: Generator, prompts: list[list[int]], new_tokens: int, until: list[str]
    ) -> list[str]:
        padded = prompts + prompts[-1:] * (_PROMPTS - len(prompts))  # else the last batch compiles anew
        ids: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_ = set(range(len(prompts)))
        for step in generator.start(padded, new_tokens, self._tokenizer.eos_id, seed=0):
            for i in sorted(open_):
                token = step[i]
                if token is not None and token != self._tokenizer.eos_id:
                    ids[i].append(token)
                    texts[i] = self._tokenizer.decode(ids[i])
                    if not any(stop in texts[i] for stop in until if stop):
                        continue
                open_.remove(i)
            if not open_:
                break
        return [_up_to(text, until) for text in texts]


def _up_to(text: str, until: list[str]) -> str:
    """Truncates a text at the first of the strings `until` in it; empty strings are ignored."""
    return functools.reduce(lambda text, stop: text.partition(stop)[0] if stop else text, until, text)


# --- running tasks --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Results of one task. Shares are from 0 to 1.

    Attributes:
      task: its name in lm-eval.
      items: number of questions.
      data: file name, or the path on the hub, of the questions.
      metrics: name -> (value, standard error or None).
      chance: expected accuracy of a random guess; None where there are no choices.
      majority: accuracy of always choosing the most frequent position (first, second, ...); None likewise.
      samples: lm-eval's log of every question.
      correct: "1" for each question that `acc` counts as right, "0" for the others, in the order of the data;
        None if the task does not, or for more than `MOST_KEPT`.
    """

    task: str
    items: int
    data: str
    metrics: dict[str, tuple[float, float | None]]
    chance: float | None
    majority: float | None
    samples: list[dict[str, Any]]
    correct: str | None


def load_tasks(names: Sequence[str], data_dir: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Loads lm-eval's tasks with their data: tasks by name, and members of our groups that were left out.

    Args:
      names: tasks, tags and groups of lm-eval, and groups of ours.
      data_dir: folder of local files; None downloads the data from the hub. Members of our groups without a
        file are left out.

    Raises:
      UserError: an unknown task, or its data cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default
    datasets.disable_progress_bars()
    ours = set(expand(list(names))) <= LOCAL_TASKS.keys()
    # Looking through all of lm-eval's definitions takes 7 s.
    manager = TaskManager(include_defaults=not ours, include_path=_folders() if ours else None)
    known = {*manager.all_tasks, *GROUPS}
    for name in names:
        if name not in known:
            raise UserError(f"--tasks: there is no task {name!r}; {did_you_mean(name, known)}")
    tasks, left_out = {}, []
    for name in expand(list(names)):
        overrides: dict[str, Any] = {"task": name}
        if name in LOCAL_TASKS and name != "triviaqa":
            overrides["metric_list"] = _BOTH
        if data_dir is not None:
            path = find_file(name, data_dir)
            if path is None and name not in names:
                left_out.append(name)
                continue
            if path is None:
                raise UserError(
                    f"--data_dir={data_dir}: there is no file {LOCAL_TASKS[name].stem}*.jsonl for {name}"
                )
            overrides |= _local_data(name, path)
        # lm-eval merges a task's own definition with overrides only inside of a group.
        group = {"group": "asked_for", "task": [overrides if len(overrides) > 1 else name]}
        try:
            tasks |= manager.load([group])["tasks"]
        except Exception as error:  # datasets raises whatever its file systems and the hub raise
            if data_dir is not None:
                raise
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--tasks: cannot load the data of {name} from the hub: {type(error).__name__}: {reason}; "
                "use --data_dir=<folder> to read local files"
            ) from None
    if not tasks:
        raise UserError(f"--data_dir={data_dir}: there is no file for any of {', '.join(left_out)}")
    return tasks, left_out


def _folders() -> list[str | Path]:
    """Folders of lm-eval with the definitions of `LOCAL_TASKS`."""
    names = "arc super_glue/boolq piqa siqa hellaswag openbookqa winogrande triviaqa race"
    root = resources.files(lm_eval) / "tasks"
    return [str(root / name) for name in names.split()]


def _local_data(name: str, path: Path) -> dict[str, Any]:
    rows = datasets.Dataset.from_list(read_local(name, path))
    return {
        "custom_dataset": lambda **_: {"local": rows},
        "dataset_path": path.name,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "local",
    }


def run_task(lm: Any, name: str, task: Any, limit: int | None) -> TaskResult:
    """Evaluates an lm-eval model, such as an `Adapter`, on the first `limit` questions of a task, or all."""
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=1234)  # as lm-eval's own command
    results: Any = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1000, log_samples=True)
    samples, measured = results["samples"][name], results["results"][name]
    keys = [key.split(",") for key in measured if "," in key and "_stderr," not in key]  # metric and filter
    several = len({filter_name for _, filter_name in keys}) > 1
    metrics = {}
    for metric, filter_name in keys:
        error = measured.get(f"{metric}_stderr,{filter_name}")
        values = float(measured[f"{metric},{filter_name}"]), error if isinstance(error, float) else None
        metrics[f"{metric} ({filter_name})" if several else metric] = values
    chance, majority = _baselines(task, [sample["doc"] for sample in samples])
    return TaskResult(
        name, len(samples), str(task.DATASET_PATH), metrics, chance, majority, samples, correct(samples)
    )


def correct(samples: Sequence[dict[str, Any]]) -> str | None:
    """Right and wrong answers, see `TaskResult`."""
    right = {sample["doc_id"]: sample.get("acc") for sample in samples}
    if len(right) != len(samples) or len(samples) > MOST_KEPT or not {*right.values()} <= {0, 1}:
        return None  # a question has several filters, or `acc` is no question's own
    return "".join("1" if right[place] else "0" for place in sorted(right))


def _baselines(task: Any, docs: Sequence[Any]) -> tuple[float | None, float | None]:
    """Accuracy of a random guess, and of always choosing the most frequent position; see `TaskResult`."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, None
    places: collections.Counter[int] = collections.Counter()
    chance = 0.0
    for doc in docs:
        choices = task.doc_to_choice(doc)
        place = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if isinstance(place, list):  # several are right
            return None, None
        places[choices.index(place) if isinstance(place, str) else place] += 1
        chance += 1 / len(choices)
    return chance / len(docs), max(places.values()) / len(docs)
