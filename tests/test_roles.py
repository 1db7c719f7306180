"""Roles of config fields, against the lists that they replaced, written down here once more."""

import dataclasses

import pytest
from conftest import tiny_config

from mobilellm_jax import config
from mobilellm_jax.config import flatten, to_dict
from mobilellm_jax.roles import Role, cadence, identity, placement, roles_of, science

SEEDS = {"train.init_seed", "train.data_seed"}
CADENCE = {"train.log_every", "train.eval_every", "train.checkpoint_every", "train.writers"}
MESH = {"mesh.data", "mesh.fsdp", "mesh.tensor"}
COMPUTED = {"model.attention", "model.remat", "model.scan_unroll", "model.loss_chunk"}
DERIVED = {"model.num_kv_heads", "model.head_dim", "model.ffn_width"}
DATA = {"source", "valid_source", "valid_fraction", "text_field", "tokenizer", "sequence_length"}
SCHEDULE = {"learning_rate", "schedule", "warmup_steps", "final_fraction", "decay_fraction"}
EVALUATED = {"train.eval_rows", "train.eval_split"}
ALL = set(flatten(to_dict(tiny_config())))
SETS = {
    "RESUMABLE": {*MESH, *COMPUTED, *CADENCE, "data.cache_dir"},
    "SEEDS": SEEDS,
    "IDLE": {*SEEDS, *CADENCE, *MESH, *COMPUTED, *DERIVED, "train.eval_batch_size", "data.cache_dir"},
    "DECISIVE": {*(f"data.{name}" for name in DATA), "train.steps", "train.batch_size", *EVALUATED},
    "SHOWN": {
        *("model.depth", "model.width", "model.num_heads", "model.num_kv_heads", "model.ffn_width"),
        *("data.source", "data.sequence_length", "optimizer.learning_rate", "train.batch_size"),
    },
    "COMPILED": ALL
    - {"train.init_from", "train.resume_optimizer", "train.grow", "train.resize_embedding"}
    - {"train.teacher", "train.teacher_weight", "train.teacher_temperature"}
    - {*SEEDS, *CADENCE, *MESH, "train.steps", *EVALUATED, "data.cache_dir"}
    - {f"data.{name}" for name in DATA - {"sequence_length"}}
    - {f"optimizer.{name}" for name in SCHEDULE},
}


@pytest.mark.parametrize("name", SETS)
def test_what_follows_from_the_roles(name):
    assert getattr(config, name) == SETS[name]


def test_every_field_has_a_role_and_a_meaning():
    assert list(config.ROLES) == list(flatten(to_dict(tiny_config())))
    assert all(role.doc for role in config.ROLES.values())
    derived = {name for name, role in config.ROLES.items() if role.derived}
    assert derived == DERIVED


def test_a_field_without_a_role_is_refused_by_a_message_that_says_what_to_choose():
    data = dataclasses.make_dataclass("Data", [("path", str, science("where")), ("colour", str)])
    run = dataclasses.make_dataclass("Run", [("data", data)])
    choices = r"science\(.*placement\(.*cadence\(.*identity\("
    with pytest.raises(TypeError, match=rf"config field data\.colour: has no role; define it as {choices}"):
        roles_of(run)


@pytest.mark.parametrize(
    ("make", "role"),
    [
        (science, Role("science", "why")),
        (placement, Role("placement", "why")),
        (cadence, Role("cadence", "why", compiled=False)),
        (identity, Role("identity", "why", compiled=False)),
    ],
)
def test_what_an_imaginary_field_brings_with_it(make, role):
    run = dataclasses.make_dataclass("Run", [("colour", str, make("why"))])
    assert roles_of(run) == {"colour": role}
    assert role.idle == (make is not science)
    assert role.resumable == (make in (placement, cadence))
