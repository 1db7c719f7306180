"""Counts against the paper, the real parameter tree, and the real program: its matrix products, XLA's own
count of its FLOPs, what JAX saves for its backward pass, and the memory that XLA sets aside for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BATCH,
    FFN_KINDS,
    LENGTH,
    SHARING,
    dot_flops,
    random_batch,
    shapes,
    tiny_config,
    tiny_model,
)

from configs import mobilellm
from mobilellm_jax import model
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.model import stack
from mobilellm_jax.model.ops import precision
from mobilellm_jax.runs.run import planned_fields
from mobilellm_jax.training.step import gradients, init_state

# Total, and without norm gains as the paper counts.
PUBLISHED = {
    "125m": (124_635_456, 124_600_320),
    "350m": (345_355_200, 345_292_800),
    "600m": (603_188_352, 603_095_040),
    "1b": (1_005_461_760, 1_005_322_240),
    "1.5b": (1_511_188_800, 1_511_014_400),
    "ls_125m": (124_635_456, 124_600_320),
    "ls_350m": (345_355_200, 345_292_800),
}
VARIANTS = [
    {"num_kv_heads": 4},
    {"num_kv_heads": 1, "depth": 3},
    {"share_embedding": False},
    *({"ffn_kind": kind} for kind in FFN_KINDS),
    *SHARING,
]


def test_every_published_model_is_counted():
    assert set(PUBLISHED) == set(mobilellm.PRESETS) - {"paper", "tiny", "small"}  # these are studies


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_counts(preset):
    m = from_config_dict(mobilellm.get_config(preset)).model
    counts = accounting.parameters(m)
    assert (counts.total, counts.as_printed) == PUBLISHED[preset]
    assert sum(x.size for x in jax.tree.leaves(shapes(m))) == counts.total
    assert m.effective_depth == m.depth * (2 if preset.startswith("ls_") else 1)


@pytest.mark.parametrize(
    ("depth", "heads", "kv_heads", "head_dim", "width", "ffn_kind", "share_embedding", "millions"),
    [
        (12, 12, 12, 64, 768, "relu", False, 134.1),  # table 10, baseline
        (12, 12, 12, 64, 768, "swiglu", False, 134.1),  # table 10, + SwiGLU
        (30, 8, 8, 64, 512, "swiglu", True, 118.6),  # table 10, + embedding sharing
        (4, 20, 20, 64, 1280, "swiglu", False, 163.2),  # table 11, shallowest
        (62, 6, 6, 64, 384, "swiglu", False, 134.3),  # table 11, deepest
        (8, 16, 2, 56, 896, "swiglu", False, 126.8),  # table 13
        (15, 8, 1, 160, 1280, "swiglu", False, 343.7),  # table 13
    ],
)
def test_counts_of_the_ablations(
    depth, heads, kv_heads, head_dim, width, ffn_kind, share_embedding, millions
):
    m = tiny_model(
        vocab_size=32_000,
        depth=depth,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        width=width,
        ffn_kind=ffn_kind,
        ffn_width=None,
        share_embedding=share_embedding,
    )
    assert round(accounting.parameters(m).as_printed / 1e6, 1) == millions


def saved_for_backward(m):
    """Returns the shapes and dtypes of all that JAX keeps for the backward pass of the loss."""
    tokens_BT = jax.ShapeDtypeStruct((BATCH, LENGTH), np.int32)

    def backward(params, tokens_BT):
        return jax.vjp(lambda params: model.loss(params, tokens_BT, tokens_BT, m)[0], params)[1]

    return jax.tree.leaves(jax.eval_shape(backward, shapes(m), tokens_BT))


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_counts_equal_the_parameter_tree(overrides):
    m = tiny_model(**overrides)
    tree = shapes(m)
    counts = accounting.parameters(m)
    blocks = tree["blocks"]

    def size(part):
        return sum(x.size for x in jax.tree.leaves(part))

    assert counts.total == size(tree)
    assert counts.embedding == size(tree["embedding"])
    assert counts.head == size(tree.get("head", {}))
    assert counts.attention == size(blocks["attention"])
    assert counts.ffn == size(blocks["ffn"])
    assert counts.norms == size([blocks["attention_norm"], blocks["ffn_norm"], tree["final_norm"]])
    assert counts.non_embedding == size([blocks, tree["final_norm"]])


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_flops_equal_the_matrix_products_of_the_program(overrides):
    """Forward and training step, whose gradient program is counted with remat "none".

    The program multiplies every query with all T keys and masks afterwards, as these are few; the formula
    counts the (T + 1) / 2 that causal attention needs. The backward pass computes the scores again, and the
    sums over H that they have in common. The differences are known and taken off.
    """
    m = tiny_model(**overrides, loss_chunk=LENGTH)
    tokens_BT, targets_BT = random_batch(m)
    masked_pairs = BATCH * LENGTH * (LENGTH - 1) / 2
    masked = m.effective_depth * 2 * 2 * m.num_heads * m.head_dim * masked_pairs
    scores = m.effective_depth * 2 * m.num_heads * m.head_dim * BATCH * LENGTH * (LENGTH + 1)
    forward = jax.make_jaxpr(model.apply, static_argnums=2)(shapes(m), tokens_BT, m).jaxpr
    training = jax.make_jaxpr(jax.value_and_grad(model.loss, has_aux=True), static_argnums=3)(
        shapes(m), tokens_BT, targets_BT, m
    ).jaxpr
    counted = np.array([dot_flops(forward) - masked, dot_flops(training) - 3 * masked - scores])
    per_token = counted / tokens_BT.size
    assert accounting.forward_flops_per_token(m, LENGTH) == per_token[0]
    assert accounting.train_flops_per_token(m, LENGTH) == per_token[1]


def test_sharing_strategies_cost_the_same():
    """Only the order differs, as the paper's comparison needs."""
    models = [tiny_model(**sharing) for sharing in SHARING[1:4]]
    assert len({accounting.parameters(m) for m in models}) == 1
    assert len({accounting.forward_flops_per_token(m, LENGTH) for m in models}) == 1
    unshared = accounting.forward_flops_per_token(tiny_model(depth=4), LENGTH)
    assert accounting.forward_flops_per_token(models[0], LENGTH) == unshared


# Large enough that what the formula leaves out is below 2 %.
WIDE = {"vocab_size": 512, "width": 384, "num_heads": 6, "num_kv_heads": 3, "head_dim": 64, "ffn_width": 1024}


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_kv_heads": 6},
        {"num_kv_heads": 1, "depth": 4},
        {"ffn_kind": "relu", "sharing": "repeat_all", "num_repeats": 2},
        {"ffn_kind": "gelu", "sharing": "immediate", "num_repeats": 2, "share_embedding": False},
        {"sharing": "reverse", "num_repeats": 2, "head_dim": 96},
    ],
    ids=str,
)
def test_flops_are_those_that_xla_counts(overrides):
    """Forward and training step within 2 %, and never less than the formula.

    XLA counts elementwise operations too, and the body of a loop once however often it runs: so the layers
    are unrolled and the loss is one chunk. It counts the program, so the formula is the one with full T x T
    attention.
    """
    length = 64
    m = tiny_model(**WIDE | overrides, loss_chunk=length)
    m = dataclasses.replace(m, scan_unroll=m.effective_depth)
    tokens_BT = jax.ShapeDtypeStruct((2, length), np.int32)
    forward = jax.jit(model.apply, static_argnums=2).lower(shapes(m), tokens_BT, m)
    training = jax.jit(jax.value_and_grad(model.loss, has_aux=True), static_argnums=3).lower(
        shapes(m), tokens_BT, tokens_BT, m
    )
    counted = [program.compile().cost_analysis()["flops"] / tokens_BT.size for program in (forward, training)]
    executed = accounting.executed_flops_per_token(m, length)
    assert 1 <= counted[0] / executed < 1.02
    assert 1 <= counted[1] / accounting.executed_train_flops_per_token(m, length) < 1.02


def test_executed_flops_skip_most_of_the_masked_keys():
    """200 positions are 3 chunks of 64 queries and one of 8, each with all keys up to its end."""
    m, length = tiny_model(loss_chunk=200), 200
    tokens_BT = jax.ShapeDtypeStruct((1, length), np.int32)
    forward = jax.make_jaxpr(model.apply, static_argnums=2)(shapes(m), tokens_BT, m).jaxpr
    training = jax.make_jaxpr(jax.value_and_grad(model.loss, has_aux=True), static_argnums=3)(
        shapes(m), tokens_BT, tokens_BT, m
    ).jaxpr
    pairs = 64 * 64 + 64 * 128 + 64 * 192 + 8 * 200
    attention = m.effective_depth * 2 * 2 * m.num_heads * m.head_dim * (pairs - length * (length + 1) / 2)
    assert dot_flops(forward) == pytest.approx(
        length * accounting.forward_flops_per_token(m, length) + attention
    )
    assert dot_flops(forward) == pytest.approx(length * accounting.executed_flops_per_token(m, length))
    assert dot_flops(training) == pytest.approx(length * accounting.executed_train_flops_per_token(m, length))


def test_executed_flops_differ_by_the_masked_half_of_attention():
    m = tiny_model()
    masked_pairs = LENGTH * (LENGTH - 1) / 2
    masked = m.effective_depth * 2 * 2 * m.num_heads * m.head_dim * masked_pairs / LENGTH
    forward = accounting.forward_flops_per_token(m, LENGTH)
    assert accounting.executed_flops_per_token(m, LENGTH) == forward + masked


@pytest.mark.parametrize(
    ("plan", "reads"),
    [("0 1 2", 3), ("0 0 1 1 2 2", 3), ("0 1 2 0 1 2", 6), ("0 1 2 2 1 0", 5), ("0 1 1 2 1 1", 4)],
)
@pytest.mark.parametrize(("compute_dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_decode_reads_a_block_once_for_uses_in_a_row(plan, reads, compute_dtype, size):
    m = tiny_model(depth=3, sharing=plan, compute_dtype=compute_dtype, share_embedding=False)
    tree = shapes(m)
    of_blocks = sum(x.size for x in jax.tree.leaves(tree["blocks"])) // 3
    rest = tree["head"].size + tree["final_norm"]["gain"].size + m.width
    assert accounting.decode_bytes_per_token(m) == size * (reads * of_blocks + rest)
    tied = dataclasses.replace(m, share_embedding=True)  # the head is read whichever matrix it is
    assert accounting.decode_bytes_per_token(tied) == accounting.decode_bytes_per_token(m)


@pytest.fixture
def stacks_of_accelerators(monkeypatch):
    """In the compute dtype; a CPU stacks in float32."""
    for module in (precision, stack):
        monkeypatch.setattr(module, "stack_dtype", lambda dtype: dtype)


@pytest.mark.usefixtures("stacks_of_accelerators")
@pytest.mark.parametrize("overrides", [*SHARING, {"num_kv_heads": 1}, {"compute_dtype": "bfloat16"}], ids=str)
def test_the_cache_holds_the_keys_and_values_of_every_layer_applied(overrides):
    """Which are what the program computes, and keeps under remat "dots"."""
    m = tiny_model(**overrides, remat="dots")
    stacked = (m.effective_depth, BATCH, LENGTH, m.num_kv_heads, m.head_dim)
    keys_values = [x for x in saved_for_backward(m) if x.shape == stacked]
    assert len(keys_values) == 2
    per_token = sum(x.size * x.dtype.itemsize for x in keys_values) / (BATCH * LENGTH)
    assert accounting.kv_cache_bytes_per_token(m) == per_token


@pytest.mark.parametrize("share_embedding", [True, False])
def test_optimizer_bytes_are_those_of_the_training_state_and_a_gradient(share_embedding):
    config = tiny_config(**{"model.share_embedding": share_embedding})
    state = jax.eval_shape(lambda: init_state(jax.random.key(0), config.model, config.optimizer))
    trees = [state.params, state.opt_state, state.params]  # a gradient is shaped like the parameters
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees) if x.ndim)  # no step counters
    assert accounting.optimizer_bytes(config.model) == size


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "overrides",
    [{"ffn_kind": "swiglu"}, {"ffn_kind": "relu", "num_kv_heads": 1}, {"ffn_kind": "gelu"}],
    ids=str,
)
@pytest.mark.usefixtures("stacks_of_accelerators")
def test_kept_activations_are_what_jax_saves_for_the_backward_pass(remat, compute_dtype, overrides):
    """All that differentiation keeps for every layer: the arrays that the scan stacks over the plan."""
    m = tiny_model(
        **overrides, remat=remat, compute_dtype=compute_dtype, sharing="0 1 0 1 1", loss_chunk=LENGTH
    )
    saved = [
        x for x in saved_for_backward(m) if not np.issubdtype(x.dtype, np.integer)
    ]  # tokens, and numbers of blocks
    layers = [x for x in saved if x.shape[:1] == (m.effective_depth,)]
    kept = accounting.kept_activation_bytes(m, LENGTH, BATCH)
    saved_bytes = sum(x.size * x.dtype.itemsize for x in layers)
    if (m.ffn_kind, remat) == ("gelu", "none") and jax.__version_info__ >= (0, 11):
        saved_bytes += m.effective_depth * BATCH * LENGTH * m.ffn_width * jnp.dtype(compute_dtype).itemsize
    assert m.effective_depth * kept == saved_bytes
    norm = [x for x in saved if x.shape[:2] == (BATCH, LENGTH) and x.shape[2] in (1, m.width)]
    # What activation_bytes adds, with a vocabulary too small for the loss to matter.
    m = dataclasses.replace(m, vocab_size=1)
    everything = accounting.kept_activation_bytes(dataclasses.replace(m, remat="none"), LENGTH, BATCH)
    everything += BATCH * m.num_heads * LENGTH * LENGTH * (4 + jnp.dtype(compute_dtype).itemsize)  # weights
    if m.ffn_kind == "swiglu":
        everything += 2 * BATCH * LENGTH * m.ffn_width * jnp.dtype(compute_dtype).itemsize
    final_norm = accounting.activation_bytes(m, LENGTH, BATCH) - m.effective_depth * kept - everything
    assert final_norm == sum(x.size * x.dtype.itemsize for x in norm)


@pytest.mark.parametrize(
    ("remat", "overrides", "low", "high"),
    [
        ("none", {}, 0.95, 1.12),
        ("none", {"vocab_size": 8192, "depth": 2}, 0.95, 1.12),
        ("dots", {"sharing": "repeat_all", "num_repeats": 2}, 0.9, 1.2),
        ("full", {}, 0.9, 1.2),
    ],
    ids=str,
)
def test_activation_bytes_are_about_the_memory_that_xla_sets_aside(remat, overrides, low, high):
    rows, length = 8, 128
    size = {"depth": 4, "width": 64, "head_dim": 16, "ffn_width": 256, "loss_chunk": length}
    m = tiny_model(**{"vocab_size": 512, **size, **overrides}, remat=remat)
    rows_AMS = jax.ShapeDtypeStruct((1, rows, length + 1), np.int32)
    program = jax.jit(gradients, static_argnums=2).lower(shapes(m), rows_AMS, m).compile()
    aside = program.memory_analysis().temp_size_in_bytes
    assert low < accounting.activation_bytes(m, length, rows) / aside < high


def test_budgets_of_a_record():
    config = tiny_config(**{"model.share_embedding": False, "train.accumulation_steps": 2})
    m, counts = config.model, accounting.parameters(config.model)
    budgets = planned_fields(config)["budgets"]
    assert list(budgets) == [
        "total_parameters",
        "embedding_parameters",
        "non_embedding_parameters",
        "train_flops_per_token",
        "inference_flops_per_token",
        "kv_cache_bytes_per_token",
        "decode_bytes_per_token",
        "optimizer_bytes",
        "activation_bytes",
    ]
    assert budgets["total_parameters"] == counts.total
    assert budgets["embedding_parameters"] == 2 * m.vocab_size * m.width
    assert budgets["embedding_parameters"] + budgets["non_embedding_parameters"] == counts.total
    assert budgets["train_flops_per_token"] == 3 * budgets["inference_flops_per_token"]
    assert budgets["activation_bytes"] == accounting.activation_bytes(m, LENGTH, BATCH // 2)
