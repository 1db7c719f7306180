"""Diagnostics against loops over layers, heads and positions in NumPy, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, tiny_config, tiny_model
from test_model import _numpy_attention, _numpy_ffn, _numpy_norm, _numpy_rotate

from mobilellm_jax import data
from mobilellm_jax.analysis import layers
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.data.rows import PADDING, no_target
from mobilellm_jax.diagnostics.attention_distance import attend_and_measure
from mobilellm_jax.diagnostics.diagnosis import diagnose
from mobilellm_jax.diagnostics.layer_use import costs, padded, plan_losses, plans_of, shortened, skipped
from mobilellm_jax.model.parameterization import multipliers
from mobilellm_jax.parallel import partition

# Base depth of 2: the branches are multiplied by 1/2, whatever is skipped.
SHAPE = {"parameterization": "completep", "base_depth": 2, "base_width": 24}


@pytest.fixture(scope="module")
def mesh():
    return partition.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))


def rows_of(m, count=8, length=9):
    """Rows of `length` inputs, of which about a third of the targets do not count."""
    rng = np.random.default_rng(3)
    rows = rng.integers(0, m.vocab_size, (count, length + 1), dtype=np.int32)
    return np.where(rng.random(rows.shape) < 0.3, no_target(rows), rows).astype(np.int32)


def numpy_states(params, tokens, m, plan):
    """Residual stream of one sequence before the first layer and after each: [layers + 1][T, D]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    states, scale = [params["embedding"][tokens]], multipliers(m).residual
    for u in plan:
        block = jax.tree.map(lambda w, u=u: w[u], params["blocks"])
        x = states[-1]
        y = _numpy_norm(x, block["attention_norm"]["gain"], m)
        x = x + scale * _numpy_attention(y, block["attention"], m)
        y = _numpy_norm(x, block["ffn_norm"]["gain"], m)
        states.append(x + scale * _numpy_ffn(y, block["ffn"], m))
    return states


def numpy_nats(params, x, targets, m):
    """Nats of the targets of one sequence that count, from a residual stream."""
    x = _numpy_norm(x, np.asarray(params["final_norm"]["gain"], np.float64), m) * multipliers(m).logits
    logits = x @ np.asarray(params["embedding"], np.float64).T
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [-log_p[t, target] for t, target in enumerate(targets) if target >= 0]


def split(row):
    return np.where(row < 0, ~row, row)[:-1], row[1:]


def numpy_loss(params, rows, m, plan):
    found = []
    for tokens, targets in map(split, rows):
        found += numpy_nats(params, numpy_states(params, tokens, m, plan)[-1], targets, m)
    return np.mean(found)


@pytest.fixture(scope="module")
def found(mesh):
    """A diagnosis of 12 rows in two batches, the second of which is filled up, with its model and rows."""
    m = tiny_model(depth=2, sharing="reverse", num_repeats=2, **SHAPE)
    params, rows = random_params(m), rows_of(m, 12)
    batches = [rows[:8], np.concatenate([rows[8:], np.full((4, 10), PADDING, np.int32)])]
    document_RT = np.arange(12)[:, None] // 3 + np.zeros((1, 9), int)
    return diagnose(params, m, mesh, lambda: iter(batches), document_RT), m, params, rows


def test_losses_without_a_layer_and_with_two_swapped(found):
    diagnosis, m, params, rows = found
    assert diagnosis.plan == [0, 1, 1, 0]

    def loss(*plan):
        return pytest.approx(numpy_loss(params, rows, m, plan), rel=1e-5)

    assert diagnosis.targets == (rows[:, 1:] >= 0).sum()
    assert diagnosis.loss == loss(0, 1, 1, 0)
    assert diagnosis.skipped == [loss(1, 1, 0), loss(0, 1, 0), loss(0, 1, 0), loss(0, 1, 1)]
    assert diagnosis.swapped == [loss(1, 0, 1, 0), loss(0, 1, 1, 0), loss(0, 1, 0, 1)]
    assert diagnosis.without == [loss(1, 1), loss(0, 0)]
    # Of the two uses of block 1 in a row, the second costs what the loss rises by without it, the first what
    # it rises by then.
    one, none = numpy_loss(params, rows, m, (0, 1, 0)), numpy_loss(params, rows, m, (0, 0))
    assert diagnosis.costs[1:3] == pytest.approx([none - one, one - diagnosis.loss], abs=1e-5)
    assert diagnosis.costs[0] == diagnosis.skipped[0] - diagnosis.loss


def test_readings_of_every_layer(found):
    diagnosis, m, params, rows = found
    lens, cosine, distance, uniform = [], [], [], []
    for tokens, targets in map(split, rows):
        states, counts = numpy_states(params, tokens, m, m.plan), targets >= 0
        lens.append([sum(numpy_nats(params, x, targets, m)) for x in states])
        cosine.append(
            [
                sum(x[t] @ y[t] / np.sqrt((x[t] @ x[t]) * (y[t] @ y[t])) for t in np.flatnonzero(counts))
                for x, y in itertools.pairwise(states)
            ]
        )
        distance.append(
            [numpy_distances(params, x, u, m)[counts].sum(0) for x, u in zip(states, m.plan, strict=False)]
        )
        uniform.append(sum(t / 2 for t in np.flatnonzero(counts)))
    targets = diagnosis.targets
    assert diagnosis.lens == pytest.approx(np.sum(lens, axis=0) / targets, rel=1e-5)
    assert diagnosis.lens[-1] == pytest.approx(diagnosis.loss, rel=1e-6)
    assert diagnosis.cosine == pytest.approx(np.sum(cosine, axis=0) / targets, rel=1e-5)
    np.testing.assert_allclose(diagnosis.distance, np.sum(distance, axis=0) / targets, rtol=1e-4)
    assert diagnosis.uniform_distance == pytest.approx(sum(uniform) / targets)


def numpy_distances(params, x, u, m):
    """Mean distance of attention in one layer, [T, N]."""
    block = jax.tree.map(lambda w: np.asarray(w[u], np.float64), params["blocks"])
    y, found = _numpy_norm(x, block["attention_norm"]["gain"], m), np.zeros((len(x), m.num_heads))
    for n in range(m.num_heads):
        q = _numpy_rotate(y @ block["attention"]["query"][:, n], m)
        k = _numpy_rotate(y @ block["attention"]["key"][:, n * m.num_kv_heads // m.num_heads], m)
        for t in range(len(x)):
            score = np.exp(k[: t + 1] @ q[t] / np.sqrt(m.head_dim))
            found[t, n] = sum(score / score.sum() * (t - np.arange(t + 1)))
    return found


def test_the_interval_is_over_documents(found, mesh):
    diagnosis, m, params, rows = found
    by_rows = diagnose(params, m, mesh, lambda: iter([rows[:8]]))
    assert by_rows.effective_depth["units"] == 8
    depth = diagnosis.effective_depth
    assert depth["units"] == 4
    assert depth["value"] == pytest.approx(ratio(diagnosis.costs))
    nats = {
        plan: [3 * numpy_nats_per(params, rows[3 * i : 3 * i + 3], m, plan) for i in range(4)]
        for plan in plans_of(m.plan)
    }
    cost = np.array(costs(m.plan, {plan: np.array(of) for plan, of in nats.items()}))
    assert layers.interval(cost) == pytest.approx((depth["low"], depth["high"]), rel=1e-3)
    one = diagnose(params, m, mesh, lambda: iter([rows[:8]]), np.zeros((8, 9), int))
    assert (one.effective_depth["low"], one.effective_depth["units"]) == (None, 1)


def numpy_nats_per(params, rows, m, plan):
    """A third of the nats of three rows."""
    return (
        sum(
            sum(numpy_nats(params, numpy_states(params, tokens, m, plan)[-1], targets, m))
            for tokens, targets in map(split, rows)
        )
        / 3
    )


def test_a_layer_that_does_nothing(mesh):
    m = tiny_model(depth=3)
    params = random_params(m)
    params["blocks"]["attention"]["output"][1] = 0
    params["blocks"]["ffn"]["down"][1] = 0
    diagnosis = diagnose(params, m, mesh, lambda: iter([rows_of(m)]))
    assert diagnosis.skipped[1] == diagnosis.loss
    assert diagnosis.costs[1] == 0
    assert diagnosis.swapped == pytest.approx([diagnosis.loss] * 2)
    assert diagnosis.cosine[1] == pytest.approx(1, abs=1e-6)
    assert max(diagnosis.cosine[0], diagnosis.cosine[2]) < 0.9
    assert diagnosis.lens[2] == pytest.approx(diagnosis.lens[1])
    assert diagnosis.without == [None] * 3


def test_one_program_serves_all_plans_of_a_length():
    m = tiny_model(depth=3)
    program = jax.jit(plan_losses, static_argnums=3)
    for plan in plans_of(m.plan):
        program(random_params(m), rows_of(m), jnp.array(padded(plan, 3)), m)
    assert program._cache_size() == 1


def test_attention_distance_is_that_of_a_loop_over_everything():
    rng = np.random.default_rng(0)
    B, T, N, K, H = 2, 70, 4, 2, 6  # longer than a chunk of queries
    q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    out, distance = jax.jit(attend_and_measure)(q, k, v)
    for b, t, n in [(0, 0, 0), (1, 1, 3), (0, 63, 1), (1, 64, 2), (0, 69, 3)]:
        score = np.exp(k[b, : t + 1, n // 2] @ q[b, t, n] / np.sqrt(H), dtype=np.float64)
        weight = score / score.sum()
        assert distance[b, t, n] == pytest.approx(sum(weight * (t - np.arange(t + 1))), rel=1e-4, abs=1e-4)
        np.testing.assert_allclose(out[b, t, n], weight @ v[b, : t + 1, n // 2], rtol=1e-4, atol=1e-5)


# --- effective depth ------------------------------------------------------------------------------------


def ratio(cost):
    kept = [c for c in cost if c > 0]
    return sum(c**0.5 for c in kept) ** 2 / sum(kept) if kept else 0


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        ([0.3] * 4, 4),
        ([0.3, 0, 0.3, -0.2], 2),
        ([5, 0], 1),
        ([0, -1], 0),
        ([3e-200, 3e-200], 2),
        ([9, 1], 1.6),
    ],
)
def test_effective_depth_counts_layers_of_equal_cost(cost, expected):
    assert layers.effective_depth(np.array(cost, float)) == pytest.approx(expected)


def test_the_interval_covers_what_other_documents_give():
    """Draws documents from a known population; 95 % intervals cover its value in about 95 % of the draws."""
    rng = np.random.default_rng(1)
    truth = np.array([0.5, 0.2, 0.1, 0.05])
    covered = 0
    for _ in range(100):
        low, high = layers.interval(rng.normal(truth[:, None], 0.3, (4, 200)), 400)
        assert low is not None
        assert high is not None
        covered += low <= ratio(truth) <= high
    assert 88 <= covered <= 100


def test_the_interval_has_the_percentiles_of_a_loop():
    rng = np.random.default_rng(2)
    costs_LU = rng.normal([[0.5], [0.2], [0.1]], 1.0, (3, 60))
    drawn = [ratio(costs_LU[:, rng.integers(0, 60, 60)].sum(axis=1)) for _ in range(4000)]
    expected = np.percentile(drawn, [2.5, 97.5])
    assert layers.interval(costs_LU) == pytest.approx(expected, abs=0.06)


def test_units_are_joined_evenly():
    sums = np.arange(1000, dtype=float)
    joined = layers.joined_units(sums)
    assert len(joined) == 500
    assert joined[:2].tolist() == [1, 5]
    assert joined.sum() == sums.sum()
    assert layers.joined_units(sums[:3]).tolist() == [0, 1, 2]


def test_costs_of_uses_in_a_row_add_up_to_all_of_them():
    plan = (0, 0, 0)
    loss = {(0, 0, 0): 1.0, (0, 0): 1.25, (0,): 2.0, (): 4.0}
    assert costs(plan, loss) == [2.0, 0.75, 0.25]
    assert set(plans_of(plan)) == set(loss)
    assert (skipped((0, 1, 1), 1), shortened((0, 1, 1), 1)) == ((0, 1), (0,))


# --- tasks ----------------------------------------------------------------------------------------------


def test_rows_of_a_task(mesh):
    source = "khop:hops=2,min_hops=1,symbols=5,queries=2"
    c = tiny_config(**{"data.source": source, "data.sequence_length": 24, "train.eval_rows": 12})
    prepared = data.prepare(c.data, c.model.vocab_size)
    found = diagnose(
        random_params(c.model), c.model, mesh, lambda: prepared.eval_batches(batch_size=8, rows=12)
    )
    assert found.targets == 12 * 4  # answers alone
    assert found.effective_depth["units"] == 12
