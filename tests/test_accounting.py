"""Counts against the paper, the real parameter tree, and the matrix products of the real program."""

import jax
import numpy as np
import pytest
from conftest import BATCH, FFN_KINDS, LENGTH, SHARING, dot_flops, random_batch, shapes, tiny_model

from configs import mobilellm
from mobilellm_jax import accounting, model
from mobilellm_jax.config import from_config_dict

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
    assert set(PUBLISHED) == set(mobilellm.PRESETS)


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

    The program multiplies every query with all T keys and masks afterwards; the formula counts the
    (T + 1) / 2 that causal attention needs. That difference is known and taken off.
    """
    m = tiny_model(**overrides, loss_chunk=LENGTH)
    tokens_BT, targets_BT = random_batch(m)
    masked_pairs = BATCH * LENGTH * (LENGTH - 1) / 2
    masked = m.effective_depth * 2 * 2 * m.num_heads * m.head_dim * masked_pairs
    forward = jax.make_jaxpr(model.apply, static_argnums=2)(shapes(m), tokens_BT, m).jaxpr
    training = jax.make_jaxpr(jax.value_and_grad(model.loss, has_aux=True), static_argnums=3)(
        shapes(m), tokens_BT, targets_BT, m
    ).jaxpr
    per_token = np.array([dot_flops(forward) - masked, dot_flops(training) - 3 * masked]) / tokens_BT.size
    assert accounting.forward_flops_per_token(m, LENGTH) == per_token[0]
    assert accounting.train_flops_per_token(m, LENGTH) == per_token[1]


def test_sharing_strategies_cost_the_same():
    """Only the order differs, as the paper's comparison needs."""
    models = [tiny_model(**sharing) for sharing in SHARING[1:4]]
    assert len({accounting.parameters(m) for m in models}) == 1
    assert len({accounting.forward_flops_per_token(m, LENGTH) for m in models}) == 1
    unshared = accounting.forward_flops_per_token(tiny_model(depth=4), LENGTH)
    assert accounting.forward_flops_per_token(models[0], LENGTH) == unshared
