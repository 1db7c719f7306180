"""Log likelihoods of given continuations: many short requests in few compiled shapes, over the mesh.

Letters as in model/__init__.py, and: C positions that a continuation is predicted at; J continuations of one
row.
Requests that read the same tokens, such as the answers "yes" and "no" to one question, share a row.
"""

import bisect
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.rows import PADDING, is_target
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition

_BATCH_TOKENS = 1 << 14  # positions in one batch, padding included
# On a CPU small batches are no slower for each position, and a few requests need less padding. Measured on 2
# cores, 6 blocks 384 wide, 224 requests: 18 s of CPU time with 16,384 positions, 11 with 4,096, 8 with 1,024.
_CPU_BATCH_TOKENS = 1 << 10
_LENGTHS = sorted(base << k for base in (16, 24) for k in range(20))  # T; at most a third is padding
_CONTINUATIONS = [4**k for k in range(1, 12)]  # C
_POWERS = [1 << k for k in range(24)]  # J, and rows of the last batch on each device


class Request(NamedTuple):
    """Token ids of a given context and of the continuation to be scored."""

    context: list[int]
    continuation: list[int]


class _Row(NamedTuple):
    """The tokens of a row, and the requests (by number) that are scored at its last positions."""

    tokens: tuple[int, ...]
    length: int  # of each continuation
    requests: list[int]


def likelihood_step(
    params: model.Params,
    tokens_BT: Int[Array, "B T"],
    first_B: Int[Array, "B"],
    targets_BCJ: Int[Array, "B C J"],
    config: ModelConfig,
) -> tuple[Float[Array, "B J"], Bool[Array, "B J"]]:
    """Log likelihood in nats of each continuation, and whether greedy decoding would give it.

    Args:
      params: the model's.
      tokens_BT: inputs; ids after the last token of a row have no effect.
      first_B: position that predicts the first token of the continuations.
      targets_BCJ: their tokens; those that are not `rows.is_target` are ignored.
      config: the model's.
    """
    x_BTD = model.hidden(params, tokens_BT, config)
    place_BC = first_B[:, None] + jnp.arange(targets_BCJ.shape[1])[None, :]
    x_BCD = jnp.take_along_axis(x_BTD, place_BC[..., None], axis=1, mode="clip")

    def at(position: tuple[Array, Array]) -> tuple[Array, Array]:
        x_BD, target_BJ = position
        log_p_BV = jax.nn.log_softmax(model.logits(params, x_BD[:, None, :])[:, 0])
        log_p_BJ = jnp.take_along_axis(log_p_BV, jnp.maximum(target_BJ, 0), axis=1)
        is_best_BJ = jnp.argmax(log_p_BV, axis=1)[:, None] == target_BJ
        return jnp.where(is_target(target_BJ), log_p_BJ, 0.0), is_best_BJ | ~is_target(target_BJ)

    # At most loss_chunk positions have their logits at one time.
    by_position = (x_BCD.swapaxes(0, 1), targets_BCJ.swapaxes(0, 1))
    log_p_CBJ, is_best_CBJ = lax.map(at, by_position, batch_size=config.loss_chunk)
    return jnp.sum(log_p_CBJ, axis=0), jnp.all(is_best_CBJ, axis=0)


@functools.lru_cache(maxsize=1)
def _program(config: ModelConfig, mesh: Mesh) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())

    def step(params: model.Params, tokens: Array, first: Array, targets: Array) -> Any:
        with partition.in_use(mesh):
            return likelihood_step(params, tokens, first, targets, config)

    return jax.jit(step, out_shardings=whole)


def log_likelihoods(
    params: model.Params,
    requests: Sequence[Request],
    config: ModelConfig,
    mesh: Mesh,
    max_length: int,
    progress: str = "",
) -> list[tuple[float, bool]]:
    """Log likelihood in nats of each request, and whether greedy decoding would give its continuation.

    A request longer than `max_length` + 1 tokens is truncated to its last ones. Collective: every process
    passes all requests and gets all answers.

    Args:
      params: the model's, on the mesh.
      requests: texts to score; contexts have at least one token.
      config: the model's.
      mesh: where to compute.
      max_length: most tokens that the model reads.
      progress: label of the progress bar; "" shows none.

    Raises:
      UserError: a context is empty, or a continuation longer than `max_length`.
    """
    rows = _rows(requests, max_length)
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # the answer for an empty continuation
    bar = tqdm(total=sum(len(row.requests) for row in rows), desc=progress, disable=not progress, leave=False)

    def read(batch: Sequence[_Row], out: Any) -> None:
        log_p_BJ, is_best_BJ = jax.device_get(out)
        for row, log_p_J, is_best_J in zip(batch, log_p_BJ, is_best_BJ, strict=False):  # the rest is padding
            for j, request in enumerate(row.requests):
                answers[request] = float(log_p_J[j]), bool(is_best_J[j])
            bar.update(len(row.requests))

    program, pending = _program(config, mesh), None
    for batch, arrays in _batches(rows, requests, mesh, max_length):
        out = program(params, *(_place(array, mesh) for array in arrays))
        if pending is not None:
            read(*pending)  # while the device works on this batch
        pending = batch, out
    if pending is not None:
        read(*pending)
    bar.close()
    return answers


def _rows(requests: Sequence[Request], max_length: int) -> list[_Row]:
    """Rows in order of computation: the longest first."""
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for number, (context, continuation) in enumerate(requests):
        length = len(continuation)
        if not context:
            raise UserError(f"request {number}: the context is empty; expected at least one token")
        if length > max_length:
            raise UserError(
                f"request {number}: the continuation of {length} tokens is longer than the context of "
                f"{max_length}; shorten it"
            )
        tokens = tuple((context + continuation)[-max_length - 1 : -1])
        if length:
            rows.setdefault((tokens, length), _Row(tokens, length, [])).requests.append(number)
    return sorted(rows.values(), key=lambda row: (*_shape(row, max_length), len(row.requests)), reverse=True)


def _shape(row: _Row, max_length: int) -> tuple[int, int]:
    """T and C of the compiled program for a row."""
    length = min(max_length, _at_least(len(row.tokens), _LENGTHS))
    return length, min(length, _at_least(row.length, _CONTINUATIONS))


def _at_least(size: int, sizes: Sequence[int]) -> int:
    return sizes[bisect.bisect_left(sizes, size)]


def _batches(
    rows: Sequence[_Row], requests: Sequence[Request], mesh: Mesh, max_length: int
) -> Iterable[tuple[Sequence[_Row], tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Yields rows and their padded arrays (tokens_BT, first_B, targets_BCJ)."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    batch_tokens = min(_BATCH_TOKENS, _CPU_BATCH_TOKENS) if is_cpu else _BATCH_TOKENS
    start = 0
    while start < len(rows):
        T = _shape(rows[start], max_length)[0]
        most = max(1, batch_tokens // (T * ways))
        B = ways * min(most, _at_least(-(-(len(rows) - start) // ways), _POWERS))
        batch = rows[start : start + B]
        C = max(_shape(row, max_length)[1] for row in batch)
        J = _at_least(max(len(row.requests) for row in batch), _POWERS)
        tokens_BT, first_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        targets_BCJ = np.full((B, C, J), PADDING, np.int32)
        for b, row in enumerate(batch):
            tokens_BT[b, : len(row.tokens)] = row.tokens
            first_B[b] = len(row.tokens) - row.length
            for j, request in enumerate(row.requests):
                targets_BCJ[b, : row.length, j] = requests[request].continuation
        yield batch, (tokens_BT, first_B, targets_BCJ)
        start += B


def _place(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Shards an array that every process has over the rows of the mesh."""
    return jax.make_array_from_callback(array.shape, partition.batch_sharding(mesh), array.__getitem__)
