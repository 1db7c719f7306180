"""Zero-shot tasks: log likelihoods for lm-evaluation-harness, ours against its own Hugging Face model.

One export, one set of requests by lm-eval's task definitions, both on all cores in float32. The Hugging Face
model gets its fastest batch size for these requests. The time includes tokenization.
"""

import dataclasses
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from configs import base
from experiments.benchmarks import measure as m
from mobilellm_jax import data, model
from mobilellm_jax.config import Config, from_config_dict, to_dict
from mobilellm_jax.data.sources import open_source
from mobilellm_jax.data.tokenizers import train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import huggingface
from mobilellm_jax.inference import local_tasks
from mobilellm_jax.runs import provenance
from mobilellm_jax.runs.directory import TOKENIZER
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check
from mobilellm_jax.storage.checkpoint import save_params

AGAINST = ("torch", "transformers", "lm_eval")

_TASKS = ("arc_easy", "piqa", "boolq", "winogrande", "hellaswag")  # short and long, one token and many
_SIZES = {
    "4 x 128": {"model.depth": 4, "model.width": 128, "model.num_heads": 4},
    "6 x 384": {"model.depth": 6, "model.width": 384, "model.num_heads": 6, "model.vocab_size": 8192},
}
_QUESTIONS = 16  # of each task
_CONTEXT = 512
_BATCHES = (4, 8, 16, 32, 64)  # of the Hugging Face model


def missing() -> str:
    """Message that names a package that is not installed; "" if all are."""
    try:
        import accelerate  # noqa: F401 # pyright: ignore[reportMissingImports]
        import lm_eval  # noqa: F401 # pyright: ignore[reportMissingImports]
        import torch  # noqa: F401 # pyright: ignore[reportMissingImports]
        import transformers  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"zero_shot: {error}; install with: pip install -e '.[hf,eval]'"
    return ""


def measure(quick: bool) -> list[m.Line]:
    """Measures requests per second of both at two sizes, and the number of answers in which they differ.

    Raises:
      UserError: an extra is not installed, or the data cannot be read.
    """
    if reason := missing():
        raise UserError(reason)
    from mobilellm_jax.inference import harness

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = flags.FLAGS.data_dir
        directory = Path(folder if given is None else given)
        if given is None:
            _write_questions(directory)
        tasks, _ = harness.load_tasks(_TASKS, directory)
        requests = []
        for task in tasks.values():
            task.set_config("num_fewshot", 0)
            task.build_all_requests(limit=2 if quick else _QUESTIONS, rank=0, world_size=1)
            requests += task.instances
        sizes = list(_SIZES)[:1] if quick else list(_SIZES)
        return [line for size in sizes for line in _compare(size, requests, Path(folder), quick)]


def _compare(size: str, requests: list[Any], folder: Path, quick: bool) -> Iterator[m.Line]:
    import torch  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from mobilellm_jax.inference import harness

    workdir, exported = folder / f"{size} run", folder / size
    config = _make_run(workdir, _SIZES[size])
    huggingface.export_run(workdir, exported, "float32")
    _, params = open_run(workdir)
    tokenizer = data.load_tokenizer(workdir / TOKENIZER)
    mesh = check(config)
    torch.set_num_threads(provenance.device()["cores"])
    # lm-eval's decorator hides the class from pyright.
    theirs = cast(Any, HFLM)(pretrained=str(exported), device="cpu", dtype="float32", batch_size=1)

    def of_ours() -> None:
        # A new adapter each time, since it caches the encoding of a text.
        lm = harness.Adapter(params, config, tokenizer, mesh, add_bos=True)
        answers["ours"] = lm.loglikelihood(requests)

    answers = {}

    def of_theirs() -> None:
        answers["theirs"] = theirs.loglikelihood(requests, disable_tqdm=True)

    seconds = {}
    for theirs.batch_size_per_gpu in _BATCHES[:1] if quick else _BATCHES:
        theirs.loglikelihood(requests[:8], disable_tqdm=True)
        start = time.perf_counter()
        of_theirs()
        seconds[theirs.batch_size_per_gpu] = time.perf_counter() - start
    theirs.batch_size_per_gpu = min(seconds, key=lambda size: seconds[size])
    start = time.perf_counter()
    of_ours()
    first = time.perf_counter() - start
    turns = m.alternate({"ours": of_ours, "theirs": of_theirs}, 1 if quick else 3)
    different = sum(
        greedy != greedy_ or not np.isclose(log_p, log_p_, rtol=1e-4, atol=1e-4)
        for (log_p, greedy), (log_p_, greedy_) in zip(answers["ours"], answers["theirs"], strict=True)
    )
    rates = {side: m.rates(len(requests), times) for side, times in turns.items()}
    ratio = m.ratios(rates["ours"], rates["theirs"])
    unit = "requests/s"
    yield m.Line(f"{size}: ours", unit, rates["ours"])
    yield m.Line(f"{size}: ours, the first time, which compiles", unit, m.rates(len(requests), [first]))
    yield m.Line(f"{size}: Hugging Face, batches of {theirs.batch_size}", unit, rates["theirs"])
    yield m.Line(f"{size}: ours / Hugging Face", "x", ratio, at_least=1.0)
    yield m.Line(f"{size}: answers of {len(requests):,} that differ", "", (float(different),), at_most=0.0)


def _make_run(workdir: Path, fields: dict[str, Any]) -> Config:
    """Creates a run with random weights, on which speed does not depend."""
    values = base.update(base.get_config(), {**fields, "data.sequence_length": _CONTEXT})
    config = from_config_dict(values)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    params = model.init(jax.random.key(0), config.model)
    save_params(workdir / "checkpoints" / "0", jax.device_get(params))
    data.save_tokenizer(train_bpe(f"bpe:{config.model.vocab_size}", _documents()), workdir / TOKENIZER)
    return config


def _documents() -> Iterator[str]:
    documents = open_source("bundled", "text").read(lambda _: None)
    return (document for document in itertools.islice(documents, 1000) if isinstance(document, str))


@dataclasses.dataclass
class _Words:
    """Draws texts of a random number of English words, in the order of the bundled text."""

    words: list[str]
    rng: np.random.Generator
    next: int = 0

    def __call__(self, least: int, most: int) -> str:
        start, self.next = self.next, self.next + int(self.rng.integers(least, most + 1))
        return " ".join(self.words[start : self.next])


def _write_questions(folder: Path) -> None:
    """Writes synthetic task files whose questions and answers have about the lengths of the real ones."""
    words = [word for document in _documents() for word in document.split()]
    text, count = _Words(words, np.random.default_rng(0)), 100
    rows = {
        "arc_easy": lambda: {"question": text(8, 35), "choices": [text(1, 9) for _ in range(4)]},
        "piqa": lambda: {"question": text(3, 15), "choices": [text(5, 35) for _ in range(2)]},
        "boolq": lambda: {"passage": text(40, 180), "question": text(6, 12), "choices": ["no", "yes"]},
        "winogrande": lambda: {
            "sentence": f"{text(5, 12)} _ {text(3, 10)}",
            "choices": [text(1, 1) for _ in range(2)],
        },
        "hellaswag": lambda: {
            "context": f"{text(2, 4)}: {text(10, 60)}",
            "choices": [text(5, 40) for _ in range(4)],
        },
    }
    for task, row in rows.items():
        lines = [json.dumps({**row(), "gold": 0}) + "\n" for _ in range(count)]
        (folder / f"{local_tasks.LOCAL_TASKS[task].stem}.jsonl").write_text("".join(lines))
