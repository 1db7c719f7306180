"""Low-rank adapters: a step against NumPy, what is frozen, and the merged model against the adapted one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BATCH,
    SHARING,
    apply,
    assert_trees_close,
    dot_flops,
    init,
    loss_and_gradients,
    random_batch,
    tiny_config,
)
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from test_lineage import FIELDS, Killed, config_of, folder, no_training, start, state_of  # noqa: F401

from mobilellm_jax import data
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.huggingface import export_run
from mobilellm_jax.formats.huggingface_weights import read_params
from mobilellm_jax.model.adapters import adapted, by_path, join, merged, split
from mobilellm_jax.parallel import partition
from mobilellm_jax.parameters import nest
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check
from mobilellm_jax.training.programs import make_programs
from mobilellm_jax.training.step import init_state, train_step

RANK, ALPHA = 3, 6.0
TARGETS = ("blocks/attention/output", "blocks/attention/query", "blocks/ffn/down")
LORA = {
    "train.init_from": "first",
    "train.lora_rank": RANK,
    "train.lora_alpha": ALPHA,
    "train.lora_targets": "query|attention/output|down",
}
SMOOTH = {"optimizer.epsilon": 1e-2, "optimizer.clip_norm": 0.05}
RATE = 0.1


def with_random_adapters(config):
    """Returns the adapted model and parameters in NumPy, no adapter being 0."""
    m, rng = adapted(config), np.random.default_rng(0)
    params = jax.device_get(init(jax.random.key(0), m))
    trained, frozen = split(params, m)
    named = {path: rng.normal(0, 0.3, x.shape).astype(np.float32) for path, x in by_path(trained).items()}
    return m, join(nest(named), frozen)


def plainly_merged(params):
    """The same parameters without adapters, and for each target its adapter as two matrices per block."""
    named, pairs = by_path(params), {}
    plain = {path: leaf for path, leaf in named.items() if "_adapter" not in path}
    for path in TARGETS:
        reduce, expand = (named[f"{path}_adapter/{name}"] for name in ("reduce", "expand"))
        a = [x.reshape(-1, RANK) for x in reduce]
        b = [x.reshape(RANK, -1) for x in expand]
        pairs[path] = a, b
        changed = [
            w + ALPHA / RANK * (x @ y).reshape(w.shape) for w, x, y in zip(named[path], a, b, strict=True)
        ]
        plain[path] = np.stack(changed)
    return nest(plain), pairs


def test_a_step_is_adam_on_the_factors_of_the_updates():
    """Of blocks that are applied twice, in two orders."""
    config = tiny_config(**LORA, **SMOOTH, **{"model.sharing": "reverse", "model.num_repeats": 2})
    m, params = with_random_adapters(config)
    o = config.optimizer
    tokens, targets = random_batch(config.model, 9)
    rows = np.concatenate([tokens, np.maximum(targets[:, -1:], 0)], axis=1)
    state = jax.jit(init_state, static_argnums=(1, 2))(jax.random.key(0), m, o)._replace(params=params)
    after, metrics = jax.jit(train_step, static_argnums=(3, 4, 5))(state, rows, jnp.float32(RATE), m, o, 1)

    plain, pairs = plainly_merged(params)
    (nats, count), grads = loss_and_gradients(plain, rows[:, :-1], rows[:, 1:], config.model)
    assert float(metrics["loss"]) == pytest.approx(float(nats) / float(count), rel=1e-5)
    expected = {}
    for path, (a, b) in pairs.items():
        dw = [g.reshape(len(x), -1) / count for g, x in zip(by_path(grads)[path], a, strict=True)]
        scale = ALPHA / RANK
        expected[f"{path}_adapter/reduce"] = a, [scale * g @ y.T for g, y in zip(dw, b, strict=True)]
        expected[f"{path}_adapter/expand"] = b, [scale * x.T @ g for g, x in zip(dw, a, strict=True)]
    norm = np.sqrt(sum((np.square(g)).sum() for _, gs in expected.values() for g in gs))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert norm > o.clip_norm
    before, after = by_path(params), by_path(jax.device_get(after.params))
    for path, leaf in after.items():
        if path not in expected:
            assert np.array_equal(leaf, before[path]), path  # frozen
            continue
        for block, (w, g) in enumerate(zip(*expected[path], strict=True)):
            g = g * o.clip_norm / norm
            update = g / (np.sqrt(np.square(g)) + o.epsilon) + o.weight_decay * w  # Adam's first step
            moved = (w - RATE * update).reshape(leaf[block].shape)
            np.testing.assert_allclose(leaf[block], moved, rtol=0, atol=2e-5, err_msg=path)


def test_what_is_frozen_has_no_optimizer_state():
    for name in ("adamw", "muon"):
        config = tiny_config(**LORA, **{"optimizer.name": name})
        m = adapted(config)
        state = jax.eval_shape(lambda: init_state(jax.random.key(0), m, config.optimizer))  # noqa: B023
        sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
        # reduce: 2 blocks of D x R, N H x R and F x R; expand: of R x N H, R x D and R x D.
        trained = 2 * RANK * ((24 + 40) + (40 + 24) + (32 + 24))
        assert sum(sizes) == 2 * trained  # two moments each
        assert accounting.adapters(m) == trained
        assert accounting.parameters(m) == accounting.parameters(config.model)
        total = accounting.parameters(m).total
        assert accounting.optimizer_bytes(m) == 4 * (total + trained) + 4 * 3 * trained


@pytest.mark.parametrize("unroll", [1, 4])
def test_merged_weights_give_the_logits_of_the_adapted_model(unroll):
    sharing = {f"model.{name}": value for name, value in SHARING[1].items()}
    m, params = with_random_adapters(tiny_config(**LORA, **sharing, **{"model.scan_unroll": unroll}))
    plain, _ = plainly_merged(params)
    tokens, _ = random_batch(m, 9)
    config = tiny_config(**sharing).model
    expected, ours = (np.asarray(apply(p, tokens, c)) for p, c in ((plain, config), (params, m)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    assert_trees_close(jax.device_get(merged(params, m)), plain, tolerance=1e-6)
    fresh, unchanged = (init(jax.random.key(0), c) for c in (m, config))
    assert_trees_close(jax.device_get(merged(fresh, m)), jax.device_get(unchanged), tolerance=0)


def test_adapters_add_little_work_to_a_step():
    """FLOPs of all matrix products, of blocks as wide as those of the smallest published model."""
    shape = {
        "model.width": 576,
        "model.num_heads": 9,
        "model.num_kv_heads": 3,
        "model.head_dim": 64,
        "model.ffn_width": 1536,
        "data.sequence_length": 256,
        "model.remat": "dots",
    }
    mesh = AbstractMesh((1, 1, 1), partition.AXES, axis_types=(AxisType.Auto,) * 3)
    all_matrices = {**LORA, "train.lora_rank": 8, "train.lora_targets": "attention|ffn"}
    full, ours = (
        dot_flops(make_programs(tiny_config(**shape, **fields), mesh).trace_step().jaxpr)
        for fields in ({}, all_matrices)
    )
    assert 1 < ours / full < 1.03


def test_adapters_are_split_over_the_mesh_as_their_matrices():
    config = tiny_config(**LORA)
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    programs = make_programs(config, mesh)
    blocks = programs.state.params["blocks"]
    query, down = blocks["attention"]["query_adapter"], blocks["ffn"]["down_adapter"]
    assert query["reduce"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert query["expand"].sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert down["reduce"].sharding.spec == PartitionSpec(None, "tensor", None)
    assert down["expand"].sharding.spec == PartitionSpec(None, None, "fsdp")


FINE = {**{name: value for name, value in LORA.items() if name != "train.init_from"}, "train.data_seed": 2}


@pytest.mark.slow
def test_adapters_of_a_run_are_merged_where_it_is_opened_exported_or_continued(folder, tmp_path):  # noqa: F811
    fields = {**FINE, "train.steps": 3, "optimizer.learning_rate": 0.05}
    record = start(folder, "tuned", "first", **fields)
    config = config_of(folder, "first", **fields)
    _, first = open_run(folder / "first")
    opened, params = open_run(folder / "tuned")
    assert (opened.train.lora_rank, opened.model) == (0, config.model)
    was, now = by_path(first), by_path(params)
    changed = {path for path in was if not np.array_equal(was[path], now[path])}
    assert changed == set(TARGETS)
    # What was evaluated in training is what the merged model gives.
    prepared = data.prepare(config.data, 264)
    rows = np.concatenate(list(prepared.eval_batches(batch_size=BATCH, rows=8)))
    (nats, count), _ = loss_and_gradients(params, rows[:, :-1], rows[:, 1:], opened.model)
    assert record.final["loss"] == pytest.approx(float(nats) / float(count), rel=1e-5)
    export_run(folder / "tuned", tmp_path / "exported", "float32")
    exported = read_params(tmp_path / "exported", opened.model, opened.model.plan)
    assert_trees_close(exported, params, tolerance=0)
    # A run that starts from it starts from the merged weights, with adapters of its own or without.
    for name, changes in (("after", {}), ("twice", {**FINE, "train.lora_rank": 2})):
        record = start(
            folder, name, "tuned", **changes, **{"train.steps": 1, "optimizer.learning_rate": 1e-30}
        )
        after = by_path(open_run(folder / name)[1])
        for path, leaf in now.items():
            np.testing.assert_allclose(after[path], leaf, rtol=0, atol=1e-6, err_msg=path)
        assert record.parent["parent"]["run"] == "first"
    with pytest.raises(UserError, match=r"tuned has an optimizer state for its adapters only"):
        start(folder, "more", "tuned", **{"train.resume_optimizer": True})


@pytest.mark.slow
def test_killed_adapters_resume_bit_for_bit_without_their_parent(folder):  # noqa: F811
    fields = {**FINE, "train.steps": 3, "train.checkpoint_every": 1}
    shutil.copytree(folder / "first", folder / "lent")
    start(folder, "whole", "lent", **fields)

    def kill(line):
        if line.startswith("step 2/3"):
            raise Killed

    with pytest.raises(Killed):
        start(folder, "stopped", "lent", kill, **fields)
    (folder / "lent").rename(folder / "returned")
    start(folder, "stopped", "lent", **fields)
    states = [state_of(folder, name, **fields)[1] for name in ("whole", "stopped")]
    assert_trees_close(*states, tolerance=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train.lora_rank": 25},
            r"lora_rank: 25 is above the 24 inputs of blocks/attention/query; use at most 24",
        ),
        (
            {"train.lora_rank": 21, "train.lora_targets": "key"},
            r"lora_rank: 21 is above the 20 outputs of blocks/attention/key",
        ),
        (
            {"train.lora_targets": "querry"},
            r"lora_targets: 'querry' is found in none of blocks/attention/query, ",
        ),
        ({"train.lora_targets": "embedding"}, r"'embedding' is found in none of"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(tiny_config(**{**LORA, **changes}))


def test_a_record_counts_adapters_apart():
    from mobilellm_jax.runs.run import planned_fields

    config = tiny_config(**LORA)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, lora_rank=0))
    adapted_fields, plain_fields = planned_fields(config), planned_fields(plain)
    assert adapted_fields["parameters"].pop("adapters") == accounting.adapters(adapted(config))
    assert adapted_fields["parameters"] == plain_fields["parameters"]
    assert adapted_fields["budgets"]["optimizer_bytes"] < plain_fields["budgets"]["optimizer_bytes"]
    assert json.dumps(plain_fields["budgets"]) == json.dumps(accounting.budgets(config.model, 9, BATCH))
