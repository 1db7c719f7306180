"""Measures the latency of our own decoding, for `experiments.latency`: a prompt, then token by token."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mobilellm_jax import model
from mobilellm_jax.analysis.latency_table import Measured
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import GREEDY, Generator

PROGRAM = "our own decoding"
_WINDOW_S = 2e-3  # of tokens timed together: less than what the system gives to other work at a time
_WINDOWS = 4  # in a turn
_FEWEST = 3  # tokens of a window

Shape = tuple[ModelConfig, int]  # and the slots of its cache
Turn = Callable[[], tuple[float, float]]


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
    shapes: Sequence[Shape], base: ModelConfig, rounds: int, say: Callable[[str], None]
) -> list[Measured]:
    """Measures shapes at batch 1: a prompt that fills half of the cache, then some tokens.

    In rounds over all shapes, so that a time in which the machine is slow hits all of them; their weights are
    in memory together. In a turn, a shape reads its prompt twice and the second time counts; of the tokens
    after it, the fastest of a few windows.

    Args:
      shapes: models, whose weights are random; slots are powers of 2 of at least 32.
      base: what the fields of `Measured` differ from.
      rounds: at least 1.
      say: receives a line for each shape and round.
    """
    turns: list[Turn] = []
    for number, (config, slots) in enumerate(shapes, start=1):
        start = time.perf_counter()
        turns.append(_turn_of(config, slots))
        seconds = time.perf_counter() - start
        say(f"{number} of {len(shapes)} compiled, {seconds:.1f} s: {described(config)}, {slots} slots")
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


def _turn_of(config: ModelConfig, slots: int) -> Turn:
    """Compiles, and returns a turn: seconds of a prompt and of a token."""
    prompt = [[i % config.vocab_size for i in range(slots // 2)]]
    generator = Generator(_random(config), config, GREEDY, slots)

    def read() -> Any:
        text = generator.start(prompt, slots // 2, None, 0)
        start = time.perf_counter()
        next(text)
        return text, time.perf_counter() - start

    def window(text: Any, tokens: int) -> float:
        start = time.perf_counter()
        for _ in range(tokens):
            next(text)
        return (time.perf_counter() - start) / tokens

    text, _ = read()
    window(text, _FEWEST)
    most = (slots // 2 - 1) // _WINDOWS
    tokens = min(most, max(_FEWEST, round(_WINDOW_S / window(text, _FEWEST))))

    def turn() -> tuple[float, float]:
        read()
        text, prefill = read()
        return prefill, min(window(text, tokens) for _ in range(_WINDOWS))

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
