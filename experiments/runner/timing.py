"""Measures latency, for `experiments.latency`: a prompt, then token by token, by us or by llama.cpp."""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from mobilellm_jax import model
from mobilellm_jax.analysis.latency_table import Measured
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import gguf, llama_cpp
from mobilellm_jax.inference.generate import GREEDY, Generator

_WINDOW_S = 2e-3  # of tokens timed together: less than what the system gives to other work at a time
_WINDOWS = 4  # in a turn
_FEWEST = 3  # tokens of a window

Shape = tuple[ModelConfig, int]  # and the slots of its cache
Turn = Callable[[], tuple[float, float]]
Step = Callable[[], object]  # makes the next token
Read = Callable[[], tuple[Step, float]]  # reads the prompt: what to go on with, and the seconds it took
Open = Callable[[ModelConfig, int], Read]


def use_threads(count: int) -> None:
    """Keeps this process, and so JAX, which looks once when it starts, on `count` cores.

    Raises:
      UserError: there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise UserError(f"--threads={count}: this process may use {len(cores)} cores; use at most that")
    os.sched_setaffinity(0, set(cores[-count:]))


def measured(
    shapes: Sequence[Shape], base: ModelConfig, rounds: int, open_: Open, say: Callable[[str], None]
) -> list[Measured]:
    """Measures shapes at batch 1: a prompt that fills half of the cache, then some tokens.

    In rounds over all shapes, so that a time in which the machine is slow hits all of them; their weights are
    in memory together. In a turn, a shape reads its prompt twice and the second time counts; of the tokens
    after it, the fastest of a few windows.

    Args:
      shapes: models, whose weights are random; slots are powers of 2 of at least 32.
      base: what the fields of `Measured` differ from.
      rounds: at least 1.
      open_: `ours`, or `in_llama_cpp(kind)`.
      say: receives a line for each shape and round.
    """
    turns: list[Turn] = []
    for number, (config, slots) in enumerate(shapes, start=1):
        start = time.perf_counter()
        turns.append(_turn_of(open_(config, slots), slots))
        seconds = time.perf_counter() - start
        say(f"{number} of {len(shapes)} ready, {seconds:.1f} s: {described(config)}, {slots} slots")
    found: list[list[tuple[float, float]]] = [[] for _ in shapes]
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        for times, turn in zip(found, turns, strict=True):
            times.append(turn())
        say(f"round {number} of {rounds}: {time.perf_counter() - start:.1f} s")
    return [_of(base, *shape, times) for shape, times in zip(shapes, found, strict=True)]


def _of(base: ModelConfig, config: ModelConfig, slots: int, turns: list[tuple[float, float]]) -> Measured:
    prefill, decode = ([1e3 * seconds for seconds in times] for times in zip(*turns, strict=True))
    return Measured(
        fields={name: value for name, value in vars(config).items() if value != getattr(base, name)},
        slots=slots,
        decode_ms=min(decode),
        prefill_ms=min(prefill),
        decode_median_ms=statistics.median(decode),
        prefill_median_ms=statistics.median(prefill),
    )


def ours(config: ModelConfig, slots: int) -> Read:
    """Our own decoding of a shape; random weights."""
    generator, prompt = Generator(_random(config), config, GREEDY, slots), _prompt(config, slots)

    def read() -> tuple[Step, float]:
        text = generator.start([prompt], slots // 2, None, 0)
        start = time.perf_counter()
        next(text)
        return (lambda: next(text)), time.perf_counter() - start

    return read


def in_llama_cpp(kind: str, config: Config) -> Open:
    """llama.cpp with weights of a type of `gguf.TYPES`; its own key/value cache, f16.

    Args:
      config: of any run, for what a file says beside its model.

    Raises:
      UserError: llama.cpp or the package that writes its files is not installed.
    """
    llama_cpp.load()

    def open_(model_config: ModelConfig, slots: int) -> Read:
        prompt, of = _prompt(model_config, slots), dataclasses.replace(config, model=model_config)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            gguf.write(path, of, _random(model_config), kind)
            there = llama_cpp.Model(path, slots, exact=False)  # keeps the file open

        def read() -> tuple[Step, float]:
            start = time.perf_counter()
            last = there.start(prompt)
            seconds = time.perf_counter() - start

            def step() -> None:
                nonlocal last
                last = there.step(last)

            return step, seconds

        return read

    return open_


def _prompt(config: ModelConfig, slots: int) -> list[int]:
    return [i % config.vocab_size for i in range(slots // 2)]


def _turn_of(read: Read, slots: int) -> Turn:
    """Warms up, and returns a turn: seconds of a prompt and of a token."""

    def window(step: Step, tokens: int) -> float:
        start = time.perf_counter()
        for _ in range(tokens):
            step()
        return (time.perf_counter() - start) / tokens

    step, _ = read()
    window(step, _FEWEST)
    most = (slots // 2 - 1) // _WINDOWS
    tokens = min(most, max(_FEWEST, round(_WINDOW_S / window(step, _FEWEST))))

    def turn() -> tuple[float, float]:
        read()
        step, prefill = read()
        return prefill, min(window(step, tokens) for _ in range(_WINDOWS))

    return turn


def described(config: ModelConfig) -> str:
    """The shape in words."""
    twice = f", {config.sharing} x{config.num_repeats}" if config.num_repeats > 1 else ""
    return (
        f"{config.depth} x {config.width}{twice}, {config.num_heads}/{config.num_kv_heads} heads, "
        f"ffn {config.ffn_width}, vocabulary {config.vocab_size:,}"
    )


def _random(config: ModelConfig) -> model.Params:
    """Random float32 weights, made by NumPy: XLA takes seconds to compile its random numbers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    return jax.tree.map(lambda of: 0.02 * rng.standard_normal(of.shape, np.float32), shapes)
