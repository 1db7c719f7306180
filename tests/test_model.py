"""The network against references that share no code with it: NumPy in float64, PyTorch, itself unrolled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    FFN_KINDS,
    SHARING,
    apply,
    assert_trees_close,
    dot_flops,
    equations,
    init,
    loss_and_gradients,
    random_batch,
    random_params,
    shapes,
    tiny_model,
)
from goldens import make_llama_logits

from mobilellm_jax import model
from mobilellm_jax.config import REMAT_POLICIES
from mobilellm_jax.model.block import Block, rms_norm, rope_table, rotate
from mobilellm_jax.model.stack import cast

SHARED = SHARING[1:]


# --- the same numbers as independent implementations ---------------------------------------------------


def numpy_logits(params, tokens_BT, m):
    """A Llama in float64 with a loop over everything: sequences, layers, heads and positions."""
    return np.stack([_numpy_sequence(params, tokens, m) for tokens in tokens_BT])


def _numpy_sequence(params, tokens, m):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["embedding"][tokens]
    for u in m.plan:
        block = jax.tree.map(lambda w, u=u: w[u], params["blocks"])
        x = x + _numpy_attention(_numpy_norm(x, block["attention_norm"]["gain"], m), block["attention"], m)
        x = x + _numpy_ffn(_numpy_norm(x, block["ffn_norm"]["gain"], m), block["ffn"], m)
    head = params["embedding"] if m.share_embedding else params["head"]
    return _numpy_norm(x, params["final_norm"]["gain"], m) @ head.T


def _numpy_norm(x, gain, m):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + m.norm_epsilon) * gain


def _numpy_rotate(x, m):
    """Rotary positions as a product of complex numbers."""
    z = x[:, : m.head_dim // 2] + 1j * x[:, m.head_dim // 2 :]
    frequency = m.rope_base ** (-np.arange(0, m.head_dim, 2) / m.head_dim)
    z = z * np.exp(1j * np.arange(len(x))[:, None] * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)


def _numpy_attention(x, w, m):
    out = np.zeros_like(x)
    for n in range(m.num_heads):
        kv = n * m.num_kv_heads // m.num_heads
        q = _numpy_rotate(x @ w["query"][:, n], m)
        k, v = _numpy_rotate(x @ w["key"][:, kv], m), x @ w["value"][:, kv]
        for t in range(len(x)):
            score = np.exp(k[: t + 1] @ q[t] / np.sqrt(m.head_dim))
            out[t] += (score / score.sum()) @ v[: t + 1] @ w["output"][n]
    return out


def _numpy_ffn(x, w, m):
    y = x @ w["up"]
    if m.ffn_kind == "swiglu":
        gate = x @ w["gate"]
        y = y * gate / (1 + np.exp(-gate))
    elif m.ffn_kind == "relu":
        y = np.maximum(y, 0)
    else:
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y @ w["down"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"share_embedding": False},
        {"rope_base": 100.0, "norm_epsilon": 0.1},
        *({"head_dim": size} for size in (28, 160)),  # smallest and largest of the paper's table 13
        *({"ffn_kind": kind} for kind in FFN_KINDS if kind != "swiglu"),
        *SHARING,
    ],
    ids=str,
)
def test_logits_equal_numpy(overrides):
    m = tiny_model(**overrides)
    params, (tokens_BT, _) = random_params(m), random_batch(m)
    expected = numpy_logits(params, tokens_BT, m)
    actual = apply(params, tokens_BT, m)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", make_llama_logits.CASES)
def test_logits_and_loss_equal_pytorch(name):
    case = make_llama_logits.CASES[name]
    m = tiny_model(**case)
    params, tokens_BT = make_llama_logits.make_weights(case), make_llama_logits.make_tokens(case)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes(m))
    with np.load(make_llama_logits.GOLDEN) as golden:
        logits_BTV, mean_loss = golden[f"{name}/logits"], golden[f"{name}/loss"]
    np.testing.assert_allclose(apply(params, tokens_BT, m), logits_BTV, rtol=1e-4, atol=1e-4)
    targets_BT = np.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    nats, count = jax.jit(model.loss, static_argnums=3)(params, tokens_BT, targets_BT, m)
    assert count == tokens_BT[:, 1:].size
    np.testing.assert_allclose(nats / count, mean_loss, rtol=1e-5)


# --- what sharing means ------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARED, ids=str)
def test_shared_model_equals_expanded_model(sharing):
    """The same layers with their own copies of the weights; a block's gradient is the sum over its copies."""
    m = tiny_model(**sharing)
    plan = np.array(m.plan)
    expanded = tiny_model(depth=len(plan))
    params, batch = random_params(m), random_batch(m)
    copies = {**params, "blocks": jax.tree.map(lambda w_U: w_U[plan], params["blocks"])}

    (nats, _), gradients = loss_and_gradients(params, *batch, m)
    (expected_nats, _), expected = loss_and_gradients(copies, *batch, expanded)

    def sum_over_uses(g_L):
        g_L = np.asarray(g_L, np.float64)
        return np.stack([g_L[plan == u].sum(0) for u in range(m.depth)])

    expected["blocks"] = jax.tree.map(sum_over_uses, expected["blocks"])
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6)
    assert_trees_close(gradients, expected, 1e-5)


def test_strategies_differ():
    """Otherwise the tests above would compare equal things."""
    params, (tokens_BT, _) = random_params(tiny_model()), random_batch(tiny_model())
    logits = [np.asarray(apply(params, tokens_BT, tiny_model(**sharing))) for sharing in SHARING]
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert np.abs(a - b).max() > 0.1


@pytest.mark.parametrize("unroll", [1, 2, 4])
def test_scan_equals_python_loop(unroll):
    m = tiny_model(sharing="reverse", num_repeats=2, scan_unroll=unroll)
    params, (tokens_BT, _) = random_params(m), random_batch(m)

    @jax.jit
    def loop(params):
        x_BTD = params["embedding"][tokens_BT]
        for u in (0, 1, 1, 0):
            block = {"params": jax.tree.map(lambda w_U, u=u: w_U[u], params["blocks"])}
            position_BT = jnp.arange(tokens_BT.shape[1])[None, :]
            x_BTD, _ = Block(m).apply(block, x_BTD, rope_table(position_BT, m))
        x_BTD = rms_norm(x_BTD, params["final_norm"]["gain"], m.norm_epsilon)
        return jnp.einsum("BTD,VD->BTV", x_BTD, params["embedding"])

    expected = loop(jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(apply(params, tokens_BT, m), expected, rtol=1e-5, atol=1e-5)
    jaxpr = jax.make_jaxpr(model.apply, static_argnums=2)(params, tokens_BT, m).jaxpr
    scans = [e.params["unroll"] for e, _ in equations(jaxpr) if e.primitive.name == "scan"]
    assert scans == ([unroll] if unroll < 4 else [])


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_without_a_loop_gradients_are_the_same_and_stacked_once(remat):
    m = tiny_model(sharing="repeat_all", num_repeats=2, remat=remat)
    params, batch, unrolled = random_params(m), random_batch(m), dataclasses.replace(m, scan_unroll=99)
    (nats, _), gradients = loss_and_gradients(params, *batch, unrolled)
    (expected_nats, _), expected = loss_and_gradients(params, *batch, m)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6)
    assert_trees_close(gradients, expected, 1e-5)
    stacked = {leaf.shape for leaf in jax.tree.leaves(shapes(m)["blocks"])}
    made = [
        equation.primitive.name
        for equation, _ in equations(_gradient_jaxpr(unrolled))
        for var in equation.outvars
        if var.aval.shape in stacked and equation.primitive.name not in ("pjit", "jit")
    ]
    assert set(made) <= {"stack", "concatenate"}  # one for each weight: no sum of whole stacks
    assert len(made) == len(jax.tree.leaves(shapes(m)["blocks"]))


# --- attention -----------------------------------------------------------------------------------------


def test_causality_is_exact():
    """Changing the tokens from position t on changes no logit before t, to the last bit, and all from t."""
    m = tiny_model(**SHARED[-1])
    params, (tokens_BT, _) = random_params(m), random_batch(m)
    logits_BTV = np.asarray(apply(params, tokens_BT, m))
    for t in range(tokens_BT.shape[1]):
        changed_BT = tokens_BT.copy()
        changed_BT[:, t:] = (changed_BT[:, t:] + 1) % m.vocab_size
        changed_BTV = np.asarray(apply(params, changed_BT, m))
        np.testing.assert_array_equal(changed_BTV[:, :t], logits_BTV[:, :t])
        assert (np.abs(changed_BTV - logits_BTV).max(-1)[:, t:] > 1e-3).all()


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(num_kv_heads):
    """Multi-head attention whose key/value heads are copied N / K times gives the same logits."""
    grouped, multi = tiny_model(num_kv_heads=num_kv_heads), tiny_model(num_kv_heads=4)
    params, (tokens_BT, _) = random_params(grouped), random_batch(grouped)
    repeated = jax.tree.map(lambda w: w, params)
    for name in ("key", "value"):
        w_UDKH = params["blocks"]["attention"][name]
        repeated["blocks"]["attention"][name] = np.repeat(w_UDKH, 4 // num_kv_heads, axis=2)
    expected = apply(repeated, tokens_BT, multi)
    np.testing.assert_allclose(apply(params, tokens_BT, grouped), expected, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    m, length = tiny_model(), 12
    q_H, k_H = np.random.default_rng(0).normal(size=(2, m.head_dim)).astype(np.float32)

    def everywhere(x_H):
        x_BTNH = jnp.broadcast_to(x_H, (1, length, 1, m.head_dim))
        return rotate(x_BTNH, rope_table(jnp.arange(length)[None, :], m))[0, :, 0]

    score_TS = np.asarray(everywhere(q_H) @ everywhere(k_H).T)
    np.testing.assert_allclose(score_TS[0, 0], q_H @ k_H, rtol=1e-5)
    for distance in range(-length + 1, length):
        diagonal = np.diagonal(score_TS, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(score_TS[0]) > 0.1  # and they do depend on it


# --- the backward pass ---------------------------------------------------------------------------------


def _gradient_jaxpr(m):
    params, batch = shapes(m), random_batch(m)
    return jax.make_jaxpr(jax.value_and_grad(model.loss, has_aux=True), static_argnums=3)(
        params, *batch, m
    ).jaxpr


def test_remat_policies_are_different_programs():
    """All compute the scores of attention again, "dots" what is elementwise too, "full" every layer."""
    tokens_BT, _ = random_batch(tiny_model())
    length = tokens_BT.shape[1]
    overrides = {**SHARED[0], "loss_chunk": length}
    m = tiny_model(**overrides)
    forward = jax.make_jaxpr(model.apply, static_argnums=2)(shapes(m), tokens_BT, m).jaxpr
    programs = {remat: _gradient_jaxpr(tiny_model(**overrides, remat=remat)) for remat in REMAT_POLICIES}
    flops = {remat: dot_flops(program) for remat, program in programs.items()}
    layers = dot_flops(forward) - 2 * tokens_BT.size * m.width * m.vocab_size
    # And the sums over H that they have in common in their gradient, which are a product with ones.
    scores = tokens_BT.size * m.effective_depth * 2 * m.num_heads * m.head_dim * (length + 1)
    down = 2 * m.width * m.ffn_width  # the last product of a layer: no gradient needs its result
    assert flops["none"] == flops["dots"] == 3 * dot_flops(forward) + scores
    assert flops["full"] == flops["none"] + layers - tokens_BT.size * m.effective_depth * down
    norms = {
        remat: sum(times for e, times in equations(program) if e.primitive.name == "rsqrt")
        for remat, program in programs.items()
    }
    assert norms["none"] == 2 * m.effective_depth + 1
    assert norms["dots"] == norms["full"] == 4 * m.effective_depth + 1


@pytest.mark.parametrize("remat", [remat for remat in REMAT_POLICIES if remat != "none"])
def test_remat_changes_no_gradient(remat):
    m = tiny_model(**SHARED[0])
    params, batch = random_params(m), random_batch(m)
    (nats, _), gradients = loss_and_gradients(params, *batch, tiny_model(**SHARED[0], remat=remat))
    (expected_nats, _), expected = loss_and_gradients(params, *batch, m)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6)
    assert_trees_close(gradients, expected, 1e-5)


@functools.cache
def _backward_memory(m):
    """Returns the temporary bytes of the gradient of one short sequence, and the bytes of all blocks."""

    def total(params, tokens_BT):
        return jnp.sum(model.hidden(params, tokens_BT, m))

    params = shapes(m)
    compiled = jax.jit(jax.grad(total)).lower(params, jax.ShapeDtypeStruct((1, 2), jnp.int32)).compile()
    blocks = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["blocks"]))
    return compiled.memory_analysis().temp_size_in_bytes, blocks


def _wide(depth, **overrides):
    """Blocks of 0.9 MB, against which the activations of two tokens are nothing."""
    return tiny_model(depth=depth, width=128, ffn_width=512, num_heads=2, num_kv_heads=1, **overrides)


@pytest.mark.parametrize(
    "overrides", [*SHARING[:4], *({**SHARING[1], "remat": remat} for remat in ("dots", "full"))], ids=str
)
def test_backward_pass_holds_no_copy_of_the_blocks(overrides):
    temporary, blocks = _backward_memory(_wide(48, **overrides))
    assert temporary < 0.15 * blocks


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_backward_memory_does_not_grow_with_depth(remat):
    models = [_wide(depth, **SHARING[1], remat=remat) for depth in (16, 48)]
    (shallow, few), (deep, many) = map(_backward_memory, models)
    assert deep - shallow < 0.1 * (many - few)  # what grows are the activations


# --- dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_bfloat16_keeps_parameters_and_gradients_in_float32(remat):
    m = tiny_model(depth=5, compute_dtype="bfloat16", remat=remat)
    program = _gradient_jaxpr(m)
    stacked = {leaf.shape for leaf in jax.tree.leaves(shapes(m)["blocks"])}
    dtypes = {
        str(var.aval.dtype)
        for equation, _ in equations(program)
        for var in equation.outvars
        if var.aval.shape in stacked
    }
    assert dtypes == {"float32"}  # the gradients of several uses add up in float32
    assert {str(var.aval.dtype) for var in program.outvars} == {"float32", "int32"}
    products = {
        str(equation.invars[0].aval.dtype)
        for equation, _ in equations(program)
        if equation.primitive.name == "dot_general"
    }
    assert "bfloat16" in products


def test_norm_gains_stay_in_float32():
    config = tiny_model(compute_dtype="bfloat16")
    block = cast(jax.tree.map(lambda w_U: w_U[0], random_params(config)["blocks"]), config, "blocks/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(block):
        assert leaf.dtype == ("float32" if path[-1].key == "gain" else "bfloat16"), path


def test_bfloat16_logits_are_close():
    params, (tokens_BT, _) = random_params(tiny_model()), random_batch(tiny_model())
    logits_BTV = np.asarray(apply(params, tokens_BT, tiny_model()))
    half_BTV = np.asarray(apply(params, tokens_BT, tiny_model(compute_dtype="bfloat16")))
    assert half_BTV.dtype == np.float32
    error = np.abs(half_BTV - logits_BTV).max() / np.abs(logits_BTV).max()
    assert 1e-4 < error < 0.05  # bfloat16 has 8 bits: rounding errors of 0.4 % at each of some ten steps


# --- initialisation and training -----------------------------------------------------------------------


def test_initialisation():
    """Every matrix from N(0, 0.02), every gain 1, every block another draw, the seed decides."""
    m = tiny_model(share_embedding=False)
    params = init(jax.random.key(0), m)
    seen = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.float32
        if path[-1].key == "gain":
            np.testing.assert_array_equal(leaf, 1)
            continue
        sigmas = np.sqrt(leaf.size)  # a mean and a standard deviation are known to within 1 / sqrt(size)
        assert abs(leaf.std() / 0.02 - 1) < 4 / sigmas, path
        assert abs(leaf.mean() / 0.02) < 4 / sigmas, path
        seen += (
            list(np.asarray(leaf).reshape(-1)[:2]) if path[0].key != "blocks" else list(leaf[:, 0].ravel())
        )
    assert len(set(map(float, seen))) == len(seen)
    jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(0), m), params)
    other = init(jax.random.key(1), m)
    assert (other["embedding"] != params["embedding"]).all()
    assert (other["blocks"]["ffn"]["down"] != params["blocks"]["ffn"]["down"]).all()


@jax.jit
def _adam_step(gradients, state, params):
    updates, state = optax.adam(1e-2).update(gradients, state)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    "head_dim", [28, *(pytest.param(size, marks=pytest.mark.slow) for size in (40, 56, 80, 112, 160))]
)
def test_every_head_size_of_the_paper_trains(head_dim):
    """Table 13 has 8 to 32 heads at widths of 896 and 1,280; each step follows the gradient."""
    m = tiny_model(head_dim=head_dim)
    params, batch = random_params(m), random_batch(m)
    (nats, _), gradients = loss_and_gradients(params, *batch, m)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    stepped = jax.tree.map(lambda p, g: p - 1e-3 / norm * g, params, gradients)
    (after, _), _ = loss_and_gradients(stepped, *batch, m)
    assert float(nats - after) == pytest.approx(1e-3 * norm, rel=0.1)


@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_every_strategy_trains(sharing):
    m = tiny_model(**sharing)
    params, batch = init(jax.random.key(0), tiny_model()), random_batch(m)
    state = optax.adam(1e-2).init(params)
    losses = []
    for _ in range(30):
        (nats, count), gradients = loss_and_gradients(params, *batch, m)
        losses.append(float(nats / count))
        params, state = _adam_step(gradients, state, params)
    assert losses[0] == pytest.approx(np.log(m.vocab_size), abs=0.1)
    assert losses[-1] < 0.7 * losses[0]
