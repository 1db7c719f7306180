"""Latency as a budget: milliseconds of a token and of a prompt at batch 1, by a model fitted to measurements.

The model is a sum: every feature of a shape is some work in its unit, and its coefficient is the time that a
unit takes, which is never negative. The coefficients are those of one device, of one program and of one type
of weights. Nothing here measures, see `experiments.latency`.

Letters as in `model/__init__.py`; a prompt has half as many tokens as the cache has slots.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from mobilellm_jax.config import DTYPE_BYTES, ModelConfig
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.parameters import declared

TIMES = ("decode_ms", "prefill_ms")
CACHES_MB = tuple(map(float, (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96)))  # that a fit tries
_READ = "MB of weights"
_SET = "working set"  # in MB; it is no work, but tells from where the weights are read
_SHAPES_FOR_EACH = 2  # shapes for each coefficient, at least
_LANES, _TILE = 32, 64  # llama.cpp's attention: f16 numbers of a vector; queries and keys of a tile


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a program keeps weights of one type.

    Attributes:
      weight_bytes: of a weight of a matrix, its share of the scale of its group included.
      cache_bytes: of a number in the key/value cache.
    """

    weight_bytes: int | float
    cache_bytes: int


OURS = {name: Stored(size, size) for name, size in DTYPE_BYTES.items()}
LLAMA_CPP = {  # groups of 32 weights with a scale of 2 bytes; the cache is f16
    "f16": Stored(2, 2),
    "q8_0": Stored(34 / 32, 2),
    "q4_0": Stored(18 / 32, 2),
}


def features(time: str, config: ModelConfig, slots: int, kind: str | None = None) -> dict[str, float]:
    """The work behind one of `TIMES`, by name, which has its unit.

    In our own decoding a token reads the blocks in the order of the plan, the head, and the keys and values
    of all slots, filled or not; then the largest logit is looked for. A block that is used again at once may
    still be in a cache of the processor: its bytes have a coefficient of their own. A prompt multiplies with
    every block as often as it is applied. `split` takes the working set of a token, all weights, keys and
    values.

    Args:
      kind: type of the weights, of `OURS` or `LLAMA_CPP`; None: the compute dtype of the model.
    """
    if kind in LLAMA_CPP:
        return (_token_in_llama_cpp if time == "decode_ms" else _prompt_in_llama_cpp)(config, slots, kind)
    stored = OURS[kind or config.compute_dtype]
    L, T, width = config.effective_depth, slots // 2, stored.weight_bytes
    of_block = _weights_of_block(config)
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    head = width * config.vocab_size * config.width / 1e6
    if time == "prefill_ms":
        return {
            "prompts": 1.0,
            "layers": float(L),
            "MB of blocks": L * width * of_block / 1e6,
            "MB of the head": head,
            "GFLOP of products": 2 * T * L * of_block / 1e9,
            "GFLOP of attention": 4 * T * slots * L * N * H / 1e9,
            "millions of scores": L * N * T * slots / 1e6,
        }
    reads = sum(1 for _ in itertools.groupby(config.plan))
    keys_and_values = 2 * L * K * slots * H * stored.cache_bytes / 1e6
    return {
        "tokens": 1.0,
        "layers": float(L),
        _READ: reads * width * of_block / 1e6 + head,
        "MB of blocks used again at once": (L - reads) * width * of_block / 1e6,
        "thousands of logits": config.vocab_size / 1e3,
        "MB of keys and values": keys_and_values,
        "thousands of scores": L * N * slots / 1e3,
        _SET: config.depth * width * of_block / 1e6 + head + keys_and_values,
    }


def _weights_of_block(config: ModelConfig, axis: str = "") -> int:
    """Numbers in the matrices of a block, or in those that have an axis, by its letter."""
    of_block = [p for p in declared(config) if p.stack and p.kind == "matrix" and axis in p.axes]
    return sum(math.prod(p.unstacked_shape(config)) for p in of_block)


def _token_in_llama_cpp(config: ModelConfig, slots: int, kind: str) -> dict[str, float]:
    """A file has a block for each layer, and a head is attended to alone.

    The numbers of a head beyond whole vectors are multiplied one at a time: a head of 16 costs more than one
    of 32.
    """
    stored = LLAMA_CPP[kind]
    L, N, K, H = config.effective_depth, config.num_heads, config.num_kv_heads, config.head_dim
    head = stored.weight_bytes * config.vocab_size * config.width / 1e6
    read = L * stored.weight_bytes * _weights_of_block(config) / 1e6 + head
    keys_and_values = 2 * L * K * slots * H * stored.cache_bytes / 1e6
    scores = L * N * slots / 1e3
    return {
        "tokens": 1.0,
        "layers": float(L),
        "heads": float(L * N),
        _READ: read,
        "thousands of logits": config.vocab_size / 1e3,
        "MB of keys and values": keys_and_values,
        "thousands of scores": scores,
        "thousands of numbers beyond vectors": scores * (H % _LANES),
        _SET: read + keys_and_values,
    }


def _prompt_in_llama_cpp(config: ModelConfig, slots: int, kind: str) -> dict[str, float]:
    """Only the last token of a prompt goes through the feed-forward part of the last layer, and the head.

    From 64 tokens on attention goes by tiles of queries and keys, without those that the mask hides; below,
    by single queries, as for a token.
    """
    width = LLAMA_CPP[kind].weight_bytes
    L, N, T, D = config.effective_depth, config.num_heads, slots // 2, config.width
    of_block, of_ffn = _weights_of_block(config), _weights_of_block(config, "F")
    tiles = T // _TILE
    in_tiles = L * N * _TILE**2 * tiles * (tiles + 1) / 2 / 1e6
    single = 0.0 if tiles else L * N * T * (T + 1) / 2 / 1e6
    return {
        "prompts": 1.0,
        "layers": float(L),
        "heads": float(L * N),
        "MB of blocks": L * width * of_block / 1e6,
        "MB of the head": width * config.vocab_size * D / 1e6,
        "GFLOP of products": 2 * (T * L * of_block - (T - 1) * of_ffn) / 1e9,
        "millions of activations": (L - 0.5) * T * D / 1e6,
        "millions of scores in tiles": in_tiles,
        "GFLOP of tiles": 4 * in_tiles * config.head_dim / 1e3,
        "millions of single scores": single,
        "millions of numbers beyond vectors": single * (config.head_dim % _LANES),
    }


def split(work: Mapping[str, float], cache_mb: float | None) -> dict[str, float]:
    """The work of a token, its weights split into those that a cache kept since the last one, and the others.

    Every token reads the weights in the same order, so what does not fit pushes out what is needed next: of a
    working set of twice the cache nothing is found there any more. None: the weights are not split.
    """
    found = {name: amount for name, amount in work.items() if name != _SET}
    if cache_mb is None or _SET not in work:
        return found
    from_memory = min(max(work[_SET] / cache_mb - 1, 0.0), 1.0)
    read = found.pop(_READ)
    kept = {
        "MB of weights from a cache": (1 - from_memory) * read,
        "MB of weights from memory": from_memory * read,
    }
    return found | kept


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted time.

    Attributes:
      coefficients: milliseconds for a unit of each feature, at least 0.
      ranges: smallest and largest value of each feature over the shapes measured.
      errors: |predicted / measured - 1| of every sample, predicted by a fit to the other shapes alone.
      cache_mb: size of the cache in `split`, one of `CACHES_MB`; None where weights are not split.
    """

    coefficients: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    errors: tuple[float, ...]
    cache_mb: float | None = None

    @property
    def median_error(self) -> float:
        return float(np.median(self.errors))

    def predict(self, work: Mapping[str, float]) -> float:
        return sum(self.coefficients[name] * amount for name, amount in split(work, self.cache_mb).items())

    def outside(self, work: Mapping[str, float]) -> list[str]:
        """Features that lie above what was measured; below it, a sum can hardly go wrong."""
        return [
            f"{name} {amount:.3g}, measured {low:.3g} to {high:.3g}"
            for name, amount in split(work, self.cache_mb).items()
            for low, high in [self.ranges[name]]
            if amount > high * (1 + 1e-6)
        ]


def fit(work: Sequence[Mapping[str, float]], times: Sequence[float], shapes: Sequence[Hashable]) -> Fit:
    """Fits the coefficients and the cache, by least squares of relative errors; no coefficient is negative.

    Args:
      work: `features` of each sample.
      times: measured milliseconds, positive.
      shapes: of each sample; the samples of one shape are left out together for `Fit.errors`.

    Raises:
      UserError: there are too few shapes for the coefficients.
    """
    check_number(work[0] if work else {}, len(set(shapes)))
    caches = CACHES_MB if _SET in work[0] else (None,)
    names = list(split(work[0], caches[0]))
    amounts_of = {
        cache: np.array([[of[name] for name in names] for of in (split(of, cache) for of in work)])
        for cache in caches
    }
    measured = np.array(times)
    errors = np.empty(len(times))
    for shape in set(shapes):
        left_out = np.array([other == shape for other in shapes])
        others = {cache: amounts[~left_out] for cache, amounts in amounts_of.items()}
        cache, solution = _solve(others, measured[~left_out])
        errors[left_out] = np.abs(amounts_of[cache][left_out] @ solution / measured[left_out] - 1)
    cache, solution = _solve(amounts_of, measured)
    return Fit(
        dict(zip(names, map(float, solution), strict=True)),
        {
            name: (float(min(column)), float(max(column)))
            for name, column in zip(names, amounts_of[cache].T, strict=True)
        },
        tuple(map(float, errors)),
        cache,
    )


def check_number(work: Mapping[str, float], shapes: int) -> None:
    """Raises UserError if there are too few shapes for the coefficients of such work."""
    coefficients = len(split(work, CACHES_MB[0]))
    least = max(1, _SHAPES_FOR_EACH * coefficients)
    if shapes < least:
        raise UserError(f"latency: {shapes} shapes for {coefficients} coefficients; measure at least {least}")


def _solve(
    amounts_of: Mapping[float | None, np.ndarray], times: np.ndarray
) -> tuple[float | None, np.ndarray]:
    """The cache of the smallest squared error, and the coefficients."""
    from scipy.optimize import nnls  # here: a sweep without latency does not need it

    solved = {}
    for cache, amounts in amounts_of.items():
        relative = amounts / times[:, None]
        scale = np.linalg.norm(relative, axis=0)
        scale[scale == 0] = 1.0  # a feature that no shape has
        solution, error = nnls(relative / scale, np.ones(len(times)))
        solved[cache] = float(error), solution / scale
    best = min(solved, key=lambda cache: solved[cache][0])
    return best, solved[best][1]


@dataclasses.dataclass(frozen=True)
class Latency:
    """Predicts the latency of a shape on one device.

    Attributes:
      fits: by type of the weights, by name of the time.
      weights: the type that is predicted for; None: the compute dtype of the model.
    """

    fits: Mapping[str, Mapping[str, Fit]]
    weights: str | None = None

    def predict(self, config: ModelConfig, slots: int) -> dict[str, float]:
        """Milliseconds of a token with a cache of `slots`, and of a prompt of half as many tokens.

        Raises:
          UserError: the type of the weights was not measured.
        """
        kind = self._kind(config)
        return {time: of.predict(features(time, config, slots, kind)) for time, of in self.fits[kind].items()}

    def outside(self, config: ModelConfig, slots: int) -> list[str]:
        """What of this shape lies outside of the shapes measured, by feature of a token or a prompt."""
        kind = self._kind(config)
        found = [
            line
            for time, of in self.fits[kind].items()
            for line in of.outside(features(time, config, slots, kind))
        ]
        return list(dict.fromkeys(found))

    def median_errors(self, config: ModelConfig) -> dict[str, float]:
        return {time: of.median_error for time, of in self.fits[self._kind(config)].items()}

    def _kind(self, config: ModelConfig) -> str:
        kind = self.weights or config.compute_dtype
        if kind not in self.fits:
            raise UserError(
                f"latency: weights in {kind!r} were not measured; {did_you_mean(kind, self.fits)}"
            )
        return kind
