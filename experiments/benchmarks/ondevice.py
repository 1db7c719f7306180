"""A model on one core of a device: llama.cpp at several types of weights, and our own decoding, at batch 1.

The model is MobileLLM-125M with random weights, or the run in --workdir. One thread everywhere. A core with
AVX2 and neither VNNI nor AMX stands for a phone's: no phone was measured. These are the kernels of xllamacpp.
With --llama_cpp, a folder with a build that brings kernels for several processors, those for AVX2 alone
(`haswell`) and the best for this machine are compared:

  npm install --ignore-scripts @node-llama-cpp/linux-x64@3.21.1
  python -m experiments.bench --only=ondevice \
    --llama_cpp=node_modules/@node-llama-cpp/linux-x64/bins/linux-x64

Each side has a process of its own. In a turn it loads the file, which the system has cached, reads a prompt
and makes a token: the time to the first token. Then it reads the prompt once more (prefill), and decodes.
Keys and values are f16 in llama.cpp, as by default, and float32 in ours. Peak memory is what the first turn
needs beyond the libraries, the file included; ours compiles in it.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmarks import measure as m
from mobilellm_jax.errors import UserError

AGAINST = ("gguf", "xllamacpp")
_TYPES = ("f16", "q8_0", "q4_0")
_AT_LEAST = {("q4_0", "AVX2"): 50.0, ("q4_0", "best kernels"): 100.0, ("q8_0", "best kernels"): 60.0}
_PROMPT, _TOKENS = 128, 32
_OURS = "float32, our own"


def missing() -> str:
    """Message that names what is not installed; "" if all is."""
    lacking = [name for name in AGAINST if find_spec(name) is None]
    if flags.FLAGS.llama_cpp:
        lacking = [name for name in lacking if name != "xllamacpp"]
    return (
        f"{', '.join(lacking)} not installed; install with: pip install -e '.[ondevice]'" if lacking else ""
    )


def measure(quick: bool) -> list[m.Line]:
    """Measures tokens per second, milliseconds to the first token, and megabytes, of every side.

    Raises:
      UserError: an extra is not installed, --llama_cpp is no such folder, or the run cannot be exported.
    """
    if reason := missing():
        raise UserError(f"ondevice: {reason}")
    kernels = _kernels()
    name, workdir, config, params = _model(quick)
    prompt = min(_PROMPT, config.data.sequence_length // 2)
    work = {"prompt": prompt, "tokens": min(_TOKENS, config.data.sequence_length - prompt)}
    work["vocab_size"] = config.model.vocab_size
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sizes, sides, answers = {}, {}, {}

        def add(side: str, what: dict[str, Any], megabytes: float) -> None:
            ask = stack.enter_context(m.process(side, __name__, json.dumps({**work, **what})))
            sizes[side], answers[side] = megabytes, []
            sides[side] = lambda: answers[side].append([float(word) for word in ask().split()])

        for kind in _TYPES:
            path = Path(folder) / f"{kind}.gguf"
            _write(path, config, params, kind)
            for label, how in kernels.items():
                add(f"{kind}, {label}", {"path": str(path), **how}, path.stat().st_size / 1e6)
        add(_OURS, {"fields": _fields(config), "workdir": workdir}, 4 * _parameters(config) / 1e6)
        m.alternate(sides, 2 if quick else 5)
    targets = _AT_LEAST if name == "125m" else {}
    return [
        line
        for side, turns in answers.items()
        for line in _lines(name, side, turns, work, sizes[side], targets.get(tuple(side.split(", "))))
    ]


def _lines(
    name: str, side: str, turns: list[list[float]], work: dict[str, int], size: float, target: float | None
) -> Iterator[m.Line]:
    """The lines of one side, from the seconds and bytes of its turns; the first one warmed up."""
    first, prefill, decode, _ = zip(*turns[1:], strict=True)
    case = f"{name}, {side}"
    yield m.Line(f"{case}: decode", "tokens/s", m.rates(work["tokens"], decode), at_least=target)
    yield m.Line(f"{case}: prefill of {work['prompt']}", "tokens/s", m.rates(work["prompt"], prefill))
    if side != _OURS:  # which compiles first
        yield m.Line(f"{case}: first token", "ms", tuple(1e3 * seconds for seconds in first))
    yield m.Line(f"{case}: {'weights' if side == _OURS else 'file'}", "MB", (size,))
    yield m.Line(f"{case}: peak memory", "MB", (turns[0][-1] / 1e6,))


def _kernels() -> dict[str, dict[str, Any]]:
    """What a process is to load, by the name of the kernels.

    Raises:
      UserError: --llama_cpp has no library.
    """
    if not flags.FLAGS.llama_cpp:
        return {"AVX2": {"library": None, "kernels": ""}}
    folder = Path(flags.FLAGS.llama_cpp).expanduser()
    libraries = sorted(folder.glob("libllama.*so*"))
    if not libraries or not (folder / "libggml-cpu-haswell.so").is_file():
        raise UserError(
            f"--llama_cpp={folder}: has no libllama*.so with libggml-cpu-haswell.so beside it; "
            "`experiments/benchmarks/ondevice.py` says where to get one"
        )
    library = str(libraries[0])
    chosen = {"AVX2": "haswell", "best kernels": ""}
    return {label: {"library": library, "kernels": name} for label, name in chosen.items()}


def _model(quick: bool) -> tuple[str, str, Any, Any]:
    """Name, run directory ("" for random weights), config and parameters of the model."""
    import jax

    from experiments import cli
    from experiments.benchmarks.shapes import config_of
    from mobilellm_jax import model
    from mobilellm_jax.runs.opening import open_run

    workdir = cli.directory("workdir", flags.FLAGS.workdir)
    if (workdir / "config.json").is_file():
        config, params = open_run(workdir)
        return workdir.name, str(workdir), config, params
    config = config_of("125m", 1, 2 * _PROMPT, quick)
    params = jax.device_get(model.init(jax.random.key(0), config.model))
    return "2 x 32" if quick else "125m", "", config, params


def _write(path: Path, config: Any, params: Any, kind: str) -> None:
    from mobilellm_jax.formats import gguf

    gguf.write(path, config, params, kind, mixed=True)


def _parameters(config: Any) -> int:
    from mobilellm_jax.costs import accounting

    return accounting.parameters(config.model).total


def _fields(config: Any) -> dict[str, Any]:
    from mobilellm_jax.config import to_dict

    return to_dict(config)


# --- in the process of a side ---------------------------------------------------------------------------


def _serve(what: dict[str, Any]) -> None:
    """Takes a turn for every line on stdin: prints "done", three times in seconds, and bytes of memory."""
    turn, before = _llama_cpp(what) if "path" in what else _ours(what)
    for _ in sys.stdin:
        print("done", *turn(), _peak() - before, flush=True)


def _prompt(what: dict[str, Any]) -> list[int]:
    return [i % what["vocab_size"] for i in range(what["prompt"])]


def _peak() -> int:
    """Bytes of memory that this process had at most; `getrusage` counts the one that started it as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(kilobytes)


def _llama_cpp(what: dict[str, Any]) -> tuple[Callable[[], list[float]], int]:
    from mobilellm_jax.formats import llama_cpp

    path, prompt, tokens = Path(what["path"]), _prompt(what), what["tokens"]
    library = llama_cpp.load(what["library"] and Path(what["library"]), what["kernels"])

    def turn() -> list[float]:
        start = time.perf_counter()
        with llama_cpp.Model(path, len(prompt) + tokens, exact=False, library=library) as there:
            there.start(prompt)
            first = time.perf_counter()
            token = there.start(prompt)
            read = time.perf_counter()
            for _ in range(tokens):
                token = there.step(token)
            return [first - start, read - first, time.perf_counter() - read]

    return turn, _peak()


def _ours(what: dict[str, Any]) -> tuple[Callable[[], list[float]], int]:
    # XLA has a thread for each core that it may use, and looks only once.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import jax

    from mobilellm_jax import model
    from mobilellm_jax.config import from_config_dict
    from mobilellm_jax.inference.generate import Generator, Sampling
    from mobilellm_jax.runs.opening import open_run

    before, config = _peak(), from_config_dict(what["fields"])
    if what["workdir"]:
        _, params = open_run(Path(what["workdir"]))
    else:
        params = model.init(jax.random.key(0), config.model)
    context, tokens = what["prompt"] + what["tokens"] + 1, what["tokens"]
    generator = Generator(params, config.model, Sampling(temperature=0.0, top_k=0, top_p=1.0), context)
    prompts = [_prompt(what)]

    def turn() -> list[float]:
        text = generator.start(prompts, 1, None, 0)
        start = time.perf_counter()
        next(text)
        read = time.perf_counter()
        text = generator.start(prompts, tokens + 1, None, 0)
        next(text)
        decode = time.perf_counter()
        for _ in range(tokens):
            next(text)
        return [0.0, read - start, time.perf_counter() - decode]

    return turn, before


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
