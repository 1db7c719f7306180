"""Log likelihoods of batched, padded and shared rows against one plain forward pass for each request."""

import jax
import numpy as np
import pytest
from conftest import apply, random_params, tiny_config, tiny_model

from mobilellm_jax.config import MeshConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import likelihood
from mobilellm_jax.inference.likelihood import Request, log_likelihoods
from mobilellm_jax.parallel import partition

MAX_LENGTH = 40


def make_requests(config, rng):
    """Returns requests of many lengths, some of which share what the model reads."""

    def ids(length):
        return [int(i) for i in rng.integers(0, config.vocab_size, length)]

    requests = [Request(ids(rng.integers(1, 60)), ids(rng.integers(1, 12))) for _ in range(40)]
    for _ in range(10):  # questions whose answers differ in their last token, or have several tokens
        question, answer = ids(rng.integers(1, 30)), ids(rng.integers(0, 3))
        requests += [Request(question, answer + ids(1)) for _ in range(3)]
    requests += [requests[-1], Request(ids(5), []), Request(ids(1), ids(MAX_LENGTH))]
    return [requests[i] for i in rng.permutation(len(requests))]


def read_by(request):
    """Input of the model: the end of the context, then the continuation without its last token."""
    return (request.context + request.continuation)[-MAX_LENGTH - 1 : -1]


def logits_of(params, tokens, config):
    """Returns float64 logits after each of `tokens`."""
    padded = np.pad(np.array(tokens), (0, MAX_LENGTH - len(tokens)))
    return np.asarray(apply(params, padded[None], config)[0, : len(tokens)], np.float64)


def one_by_one(params, requests, config):
    """Yields the log likelihood of each continuation, and whether it is the greedy one."""
    for request in requests:
        read, length = read_by(request), len(request.continuation)
        logits = logits_of(params, read, config)[len(read) - length :]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        best = [position.argmax() for position in log_p] == request.continuation
        yield sum(position[token] for position, token in zip(log_p, request.continuation, strict=True)), best


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_every_answer_is_that_of_a_request_alone(shape, monkeypatch):
    monkeypatch.setattr(likelihood, "_BATCH_TOKENS", 256)  # several batches of a length, and a part of one
    config = tiny_model()
    params = random_params(config)
    requests = make_requests(config, np.random.default_rng(0))
    for i in range(0, len(requests), 3):  # a third of the continuations begin as the model would
        context, continuation = requests[i]
        best = int(logits_of(params, context[-MAX_LENGTH:], config)[-1].argmax())
        requests[i] = Request(context, [best, *continuation[1:]][: 1 + i % 2])
    sizes = dict(zip(partition.AXES, shape, strict=True))
    mesh = partition.make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod(shape)])
    placed = jax.device_put(params, partition.shardings(params, mesh))
    answers = log_likelihoods(placed, requests, config, mesh, MAX_LENGTH)
    expected = list(one_by_one(params, requests, config))
    np.testing.assert_allclose([a[0] for a in answers], [e[0] for e in expected], rtol=1e-4)
    assert [a[1] for a in answers] == [e[1] for e in expected]
    assert 10 < sum(e[1] for e in expected) < len(requests) - 10


def test_requests_that_read_the_same_share_a_row_and_shapes_are_few():
    config, rng = tiny_model(), np.random.default_rng(0)
    requests = make_requests(config, rng)
    rows = likelihood._rows(requests, MAX_LENGTH)
    assert len(rows) < len(requests) - 20
    assert sorted(i for row in rows for i in row.requests) == [
        i for i, r in enumerate(requests) if r.continuation
    ]
    mesh = partition.make_mesh(tiny_config().mesh)
    batches = list(likelihood._batches(rows, requests, mesh, MAX_LENGTH))
    shapes = {tuple(a.shape for a in arrays) for _, arrays in batches}
    assert {a[0].shape[1] for _, a in batches} <= {16, 24, 32, 40}
    assert len(shapes) <= 8
    assert sum(len(batch) for batch, _ in batches) == len(rows)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "request 0: the context is empty"),
        (
            Request([1], [1] * 41),
            "request 0: the continuation of 41 tokens is longer than the context of 40",
        ),
    ],
)
def test_requests_without_an_answer_are_refused(request_, message):
    config = tiny_model()
    with pytest.raises(UserError, match=message):
        log_likelihoods({}, [request_], config, partition.make_mesh(tiny_config().mesh), MAX_LENGTH)
