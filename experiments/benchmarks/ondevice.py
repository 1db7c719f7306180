"""A model on one core of a device: in llama.cpp, ONNX Runtime and our own decoding, at batch 1.

The model is MobileLLM-125M with random weights, or the run in --workdir. One thread everywhere. A core with
AVX2 and neither VNNI nor AMX stands for a phone's: no phone was measured. These are the kernels of xllamacpp.
With --llama_cpp, a folder with a build that brings kernels for several processors, those for AVX2 alone
(`haswell`) and the best for this machine are compared:

  npm install --ignore-scripts @node-llama-cpp/linux-x64@3.21.1
  python -m experiments.bench --only=ondevice \
    --llama_cpp=node_modules/@node-llama-cpp/linux-x64/bins/linux-x64

ONNX Runtime takes the best kernels that it has for this machine. It is left out where its extra is not
installed. Without a run, it also measures table 7 of the paper: every block applied twice at once, and twice
as many blocks. On a phone these took 1.03 and 1.86 times the latency.

Each side has a process of its own. In a turn it loads the file, which the system has cached, reads a prompt
and makes a token: the time to the first token. Then it reads the prompt once more (prefill), and decodes.
Keys and values are f16 in llama.cpp, as by default, and float32 in ours and in ONNX Runtime. Peak memory is
what the first turn needs beyond the libraries, the file included; ours compiles in it. ONNX Runtime computes
logits after each token of a prompt, the others after the last.
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

AGAINST = ("gguf", "xllamacpp", "onnxruntime", "onnxruntime-genai")
NEEDED = AGAINST[:2]
_TYPES = ("f16", "q8_0", "q4_0")
_ONNX = ("int8", "int4")
_AT_LEAST = {("q4_0", "AVX2"): 50.0, ("q4_0", "best kernels"): 100.0, ("q8_0", "best kernels"): 60.0}
_PROMPT, _TOKENS = 128, 32
_OURS, _RUNTIME = "float32, our own", "ONNX Runtime"
_TABLE_7 = {"immediate x2": 1.03, "60 blocks": 1.86}  # latency over that of the 30 blocks, on an iPhone 13


def missing() -> str:
    """Message that names what is not installed; "" if all is."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
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
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder, turns = Path(temporary), {}
        runs = _runs(folder, quick)
        name, (workdir, config) = next(iter(runs.items()))
        prompt = min(_PROMPT, config.data.sequence_length // 2)
        work = {"prompt": prompt, "tokens": min(_TOKENS, config.data.sequence_length - prompt)}
        work["vocab_size"] = config.model.vocab_size
        sizes, sides = {}, {}

        def add(side: str, what: dict[str, Any], megabytes: float) -> None:
            ask = stack.enter_context(m.process(side, __name__, json.dumps({**work, **what})))
            sizes[side], turns[side] = megabytes, []
            sides[side] = lambda: turns[side].append([float(word) for word in ask().split()])

        for kind in _TYPES:
            path = folder / f"{kind}.gguf"
            _write(path, workdir, kind)
            for label, how in kernels.items():
                add(f"{name}, {kind}, {label}", {"path": str(path), **how}, path.stat().st_size / 1e6)
        with_onnx = _has_onnx(config.model)
        for shape, (place, of) in runs.items():
            for kind in _ONNX if shape == name else _ONNX[:1]:
                if with_onnx:
                    path = folder / f"{shape}, {kind}"
                    add(f"{shape}, {kind}, {_RUNTIME}", {"onnx": str(path)}, _build(path, place, kind))
            add(f"{shape}, {_OURS}", {"workdir": str(place)}, 4 * _parameters(of) / 1e6)
        m.alternate(sides, 2 if quick else 5)
    targets = {f"125m, {kind}, {label}": value for (kind, label), value in _AT_LEAST.items() if not quick}
    lines = [
        line
        for side, of_side in turns.items()
        for line in _lines(side, of_side, work, sizes[side], targets.get(side))
    ]
    for how in (f"int8, {_RUNTIME}", _OURS):
        seconds = {shape: _decode(turns[f"{shape}, {how}"]) for shape in runs if f"{shape}, {how}" in turns}
        lines += [_ratio(shape, how, seconds[shape], seconds[name]) for shape in list(seconds)[1:]]
    return lines


def _ratio(shape: str, how: str, seconds: list[float], once: list[float]) -> m.Line:
    """A line of table 7."""
    (paper,) = [value for name, value in _TABLE_7.items() if shape.endswith(name)]
    return m.Line(f"{shape} / 30 blocks, {how}: decode (paper: {paper})", "x", m.ratios(seconds, once))


def _decode(turns: list[list[float]]) -> list[float]:
    """Seconds of decoding in each turn; the first one warmed up."""
    return [turn[2] for turn in turns[1:]]


def _lines(
    case: str, turns: list[list[float]], work: dict[str, int], size: float, target: float | None
) -> Iterator[m.Line]:
    """The lines of one side, from the seconds and bytes of its turns; the first one warmed up."""
    first, prefill, decode, _ = zip(*turns[1:], strict=True)
    is_ours = case.endswith(_OURS)
    yield m.Line(f"{case}: decode", "tokens/s", m.rates(work["tokens"], decode), at_least=target)
    yield m.Line(f"{case}: prefill of {work['prompt']}", "tokens/s", m.rates(work["prompt"], prefill))
    if not is_ours:  # which compiles first
        yield m.Line(f"{case}: first token", "ms", tuple(1e3 * seconds for seconds in first))
    yield m.Line(f"{case}: {'weights' if is_ours else 'file'}", "MB", (size,))
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


def _runs(folder: Path, quick: bool) -> dict[str, tuple[Path, Any]]:
    """Run directories and configs of what is measured, by name, the first one in all programs."""
    from experiments import cli
    from experiments.benchmarks.shapes import config_of
    from mobilellm_jax.runs.opening import open_run

    workdir = cli.directory("workdir", flags.FLAGS.workdir)
    if (workdir / "config.json").is_file():
        return {workdir.name: (Path(workdir), open_run(workdir)[0])}
    shapes: dict[str, dict[str, Any]] = {
        "125m": {},
        "125m, immediate x2": {"sharing": "immediate", "num_repeats": 2},
        "125m, 60 blocks": {"depth": 4 if quick else 60},
    }
    configs = {name: config_of("125m", 1, 2 * _PROMPT, quick, **fields) for name, fields in shapes.items()}
    return {name: (_random_run(folder / name, config), config) for name, config in configs.items()}


def _random_run(workdir: Path, config: Any) -> Path:
    """Makes a run with random weights and a tokenizer, as converters want one."""
    import jax

    from mobilellm_jax import model
    from mobilellm_jax.config import to_dict
    from mobilellm_jax.data.tokenizers import BytesTokenizer, save_tokenizer
    from mobilellm_jax.runs.directory import TOKENIZER
    from mobilellm_jax.storage.checkpoint import save_params

    save_params(workdir / "checkpoints" / "0", jax.device_get(model.init(jax.random.key(0), config.model)))
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    save_tokenizer(BytesTokenizer(), workdir / TOKENIZER)
    return workdir


def _write(path: Path, workdir: Path, kind: str) -> None:
    from mobilellm_jax.formats import gguf
    from mobilellm_jax.runs.opening import open_run

    gguf.write(path, *open_run(workdir), kind, mixed=True)


def _has_onnx(config: Any) -> bool:
    """Whether ONNX Runtime is installed and takes the model; says so if not."""
    from mobilellm_jax.formats import onnx

    try:
        onnx.check_installed()
        onnx.check_exportable(config)
    except UserError as error:
        print(f"ondevice: {_RUNTIME} is left out: {error}", flush=True)
        return False
    return True


def _build(path: Path, workdir: Path, kind: str) -> float:
    """Makes the files for ONNX Runtime; returns their megabytes."""
    from mobilellm_jax.formats import onnx, tools

    path.mkdir()
    onnx.build(tools.open_exportable(workdir, "onnx"), path, kind)
    return sum(file.stat().st_size for file in path.glob("model.onnx*")) / 1e6


def _parameters(config: Any) -> int:
    from mobilellm_jax.costs import accounting

    return accounting.parameters(config.model).total


# --- in the process of a side ---------------------------------------------------------------------------


def _serve(what: dict[str, Any]) -> None:
    """Takes a turn for every line on stdin: prints "done", three times in seconds, and bytes of memory."""
    start = _llama_cpp if "path" in what else _onnx_runtime if "onnx" in what else _ours
    turn, before = start(what)
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


def _onnx_runtime(what: dict[str, Any]) -> tuple[Callable[[], list[float]], int]:
    # Which is not to count as memory.
    import onnxruntime_genai  # noqa: F401  # pyright: ignore[reportMissingImports]

    from mobilellm_jax.formats.onnx_runtime import Model

    path, prompt, tokens = Path(what["onnx"]), _prompt(what), what["tokens"]

    def turn() -> list[float]:
        start = time.perf_counter()
        there = Model(path, context=len(prompt) + tokens)
        there.start(prompt)
        first = time.perf_counter()
        token = int(there.start(prompt)[-1].argmax())
        read = time.perf_counter()
        for _ in range(tokens):
            token = int(there.extend([token])[-1].argmax())
        return [first - start, read - first, time.perf_counter() - read]

    return turn, _peak()


def _ours(what: dict[str, Any]) -> tuple[Callable[[], list[float]], int]:
    # XLA has a thread for each core that it may use, and looks only once.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from mobilellm_jax.inference.generate import Generator, Sampling
    from mobilellm_jax.runs.opening import open_run

    before = _peak()
    config, params = open_run(Path(what["workdir"]))
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
