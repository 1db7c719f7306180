"""One door: what comes in is complete, of the right type and in range, or the message names the field."""

import dataclasses
import json
from functools import partial

import jax
import pytest
from conftest import tiny_config, tiny_model

from configs import base
from mobilellm_jax import config
from mobilellm_jax.errors import UserError

GROUPS = {group.name: group.type for group in dataclasses.fields(config.Config)}
FIELDS = [(group, field) for group, cls in GROUPS.items() for field in dataclasses.fields(cls)]
DERIVED = ["num_kv_heads", "head_dim", "ffn_width"]
NAN, INFINITE = float("nan"), float("inf")
POSITIVE_INT, COUNT = [0, -1], [-1]
POSITIVE, NOT_NEGATIVE = [0.0, -1.0, NAN, INFINITE], [-1.0, NAN, INFINITE]
FRACTION, BELOW_ONE = [-0.1, 1.1, NAN], [-0.1, 1.0, NAN]
SEED = [-1, 2**32]
UNKNOWN = ["sideways", ""]
# Values of the right type that each field must refuse; only booleans have none.
OUT_OF_RANGE = {
    "model.loop_rank": [-1],
    "model.loop_targets": ["(", ""],
    "model.loop_scale": ["1", "learnt"],
    "train.grow": ["unroll"],  # without a parent
    "model.vocab_size": POSITIVE_INT,
    "model.depth": POSITIVE_INT,
    "model.width": POSITIVE_INT,
    "model.num_heads": POSITIVE_INT,
    "model.num_kv_heads": [0, -1, 3, 8],
    "model.head_dim": [0, -2, 5],
    "model.ffn_kind": UNKNOWN,
    "model.ffn_width": POSITIVE_INT,
    "model.sharing": [*UNKNOWN, "0", "0 1 2"],
    "model.num_repeats": [0, -1, 2],
    "model.rope_base": POSITIVE,
    "model.norm_epsilon": POSITIVE,
    "model.init_std": POSITIVE,
    "model.parameterization": UNKNOWN,
    "model.base_width": POSITIVE_INT,
    "model.base_depth": POSITIVE_INT,
    "model.compute_dtype": [*UNKNOWN, "float16"],
    "model.attention": UNKNOWN,
    "model.remat": UNKNOWN,
    "model.scan_unroll": POSITIVE_INT,
    "model.loss_chunk": POSITIVE_INT,
    "data.source": [*UNKNOWN, "file:x", "imported:x", ""],
    "data.valid_source": ["sideways", "tokens:x", "imported"],
    "data.valid_fraction": [0.0, 1.0, -0.1, NAN],
    "data.text_field": [""],
    "data.tokenizer": [*UNKNOWN, "bpe"],
    "data.sequence_length": POSITIVE_INT,
    "data.cache_dir": [""],
    "optimizer.learning_rate": POSITIVE,
    "optimizer.name": UNKNOWN,
    "optimizer.schedule": UNKNOWN,
    "train.eval_split": UNKNOWN,
    "train.loops": ["sideways", "2..1", "1..4"],  # the last, without a strategy that has loops
    "optimizer.warmup_steps": [-1, 11],
    "optimizer.final_fraction": FRACTION,
    "optimizer.decay_fraction": FRACTION,
    "optimizer.beta1": BELOW_ONE,
    "optimizer.beta2": BELOW_ONE,
    "optimizer.momentum": BELOW_ONE,
    "optimizer.epsilon": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": POSITIVE,
    "train.lora_rank": [-1, 2],  # without a run to start from
    "train.lora_targets": ["", "("],
    "train.quantize": ["int4", "w4 "],
    "train.lora_alpha": POSITIVE,
    "train.teacher_weight": FRACTION,
    "train.teacher_temperature": POSITIVE,
    "train.steps": POSITIVE_INT,
    "train.batch_size": POSITIVE_INT,
    "train.accumulation_steps": [0, -1, 3],
    "train.init_seed": SEED,
    "train.data_seed": SEED,
    "train.eval_every": POSITIVE_INT,
    "train.eval_rows": COUNT,
    "train.eval_batch_size": POSITIVE_INT,
    "train.checkpoint_every": POSITIVE_INT,
    "train.log_every": POSITIVE_INT,
    "train.writers": ["sideways", "tensorboard,", "wandb, trackio"],
    "mesh.data": [0, -2],
    "mesh.fsdp": [0, -2],
    "mesh.tensor": [0, -2],
}


def plain() -> dict:
    """Returns the fields of a valid config as nested dictionaries, to be spoilt."""
    return config.to_dict(tiny_config())


def assert_refused(values: dict, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        config.from_config_dict(values)
    for part in parts:
        assert part in str(error.value)


def test_round_trip_through_json():
    original = tiny_config(**{"model.sharing": "0 1 1", "model.share_embedding": False, "mesh.fsdp": 2})
    assert config.from_config_dict(json.loads(json.dumps(config.to_dict(original)))) == original


@pytest.mark.parametrize(
    ("fields", "derived"),
    [
        ({"width": 96, "num_heads": 6}, (6, 16, 256)),
        ({"width": 576, "num_heads": 9}, (9, 64, 1536)),  # 8/3 576 = 1536
        ({"width": 960, "num_heads": 15}, (15, 64, 2560)),  # 8/3 960 = 2560
        ({"width": 1280, "num_heads": 20}, (20, 64, 3584)),  # 8/3 1280 = 3413.3, rounded up
        ({"width": 96, "num_heads": 6, "ffn_kind": "relu"}, (6, 16, 384)),
        ({"width": 96, "num_heads": 6, "ffn_kind": "gelu"}, (6, 16, 384)),
    ],
)
def test_derived_fields(fields, derived):
    m = tiny_model(**{**dict.fromkeys(DERIVED), **fields})
    assert (m.num_kv_heads, m.head_dim, m.ffn_width) == derived


def test_explicit_fields_are_kept():
    m = tiny_model(width=96, num_heads=6, num_kv_heads=3, head_dim=10, ffn_width=7)
    assert (m.num_kv_heads, m.head_dim, m.ffn_width) == (3, 10, 7)


def test_integer_becomes_float():
    values = plain()
    values["model"]["rope_base"] = 500_000
    rope_base = config.from_config_dict(values).model.rope_base
    assert (type(rope_base), rope_base) == (float, 500_000.0)


@pytest.mark.parametrize(("group", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_wrong_type(group, field):
    """bool is not int, "1" is not a number, 1 is not a flag, and None stands for derived fields only."""
    wrong = {
        int: [True, "1", 1.0, None, [1]],
        float: [True, "1.0", None],
        str: [1, True, None],
        bool: [1, "true", None],
    }[field.type]
    for value in wrong:
        if value is None and field.name in DERIVED:
            continue
        values = plain()
        values[group][field.name] = value
        assert_refused(values, f"{group}.{field.name}: {value!r}", f"expected {field.type.__name__}")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_out_of_range(name, value):
    values = plain()
    group, field = name.split(".")
    values[group][field] = value
    assert_refused(values, f"{name}:")


def test_every_field_has_values_out_of_range():
    fields = {f"{group}.{f.name}" for group, f in FIELDS if f.type is not bool}
    assert set(OUT_OF_RANGE) == fields - {"train.init_from", "train.teacher"}  # any directory


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("modle", ["modle: no such field", "did you mean model?"]),
        ("model.widht", ["model.widht: no such field", "did you mean width?"]),
        ("optimizer.lr_peak", ["optimizer.lr_peak: no such field", "valid names: beta1, beta2, clip_norm"]),
    ],
)
def test_unknown_field(path, parts):
    values = plain()
    *groups, name = path.split(".")
    (values[groups[0]] if groups else values)[name] = 1
    assert_refused(values, *parts)


@pytest.mark.parametrize(
    "path", [*GROUPS, *(f"{group}.{field.name}" for group, field in FIELDS)], ids=lambda path: path
)
def test_missing_field(path):
    values = plain()
    *groups, name = path.split(".")
    del (values[groups[0]] if groups else values)[name]
    if path in config.BEFORE:  # newer than some configs
        assert config.from_config_dict(values) == tiny_config()
        return
    assert_refused(values, f"{path}: the field is missing")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            {"model.width": 100, "model.num_heads": 3},
            ["model.width: 100", "model.num_heads=3", "width that fits: 102"],
        ),
        ({"model.num_heads": 6, "model.num_kv_heads": 4}, ["model.num_kv_heads: 4", "valid: 1, 2, 3, 6"]),
        (
            {"model.width": 12, "model.num_heads": 4},
            ["model.width: 12", "odd head size", "width that fits: 16"],
        ),
        ({"model.head_dim": 3}, ["model.head_dim: 3 is odd"]),
        ({"model.num_repeats": 2}, ["model.num_repeats: 2", "immediate, repeat_all, reverse"]),
        ({"train.accumulation_steps": 3}, ["train.accumulation_steps: 3", "train.batch_size=8"]),
        ({"optimizer.warmup_steps": 11}, ["optimizer.warmup_steps: 11", "train.steps=10"]),
        ({"mesh.data": -1, "mesh.tensor": -1}, ["mesh: (-1, 1, -1)", "at most one axis of size -1"]),
        ({"data.valid_source": "tokens:x"}, ["data.valid_source: 'tokens:x'", "text, like data.source"]),
        (
            {"data.source": "tokens:x", "data.valid_source": "files:x"},
            ["data.valid_source: 'files:x'", "token ids, like data.source"],
        ),
        ({"train.resume_optimizer": True}, ["train.resume_optimizer: True", "set train.init_from"]),
        ({"train.resize_embedding": True}, ["train.resize_embedding: True", "set train.init_from"]),
        (
            {"train.init_from": "x", "train.resume_optimizer": True, "train.resize_embedding": True},
            ["train.resume_optimizer: True", "train.resize_embedding", "use one of them"],
        ),
        ({"train.lora_rank": 2}, ["train.lora_rank: 2", "set train.init_from"]),
        (
            {"train.init_from": "x", "train.resume_optimizer": True, "train.lora_rank": 2},
            ["train.resume_optimizer: True", "train.lora_rank=2", "use one of them"],
        ),
        (
            {"data.source": "imported", "data.valid_source": "files:x"},
            ["data.valid_source: 'files:x'", "none, like data.source"],
        ),
    ],
)
def test_fields_that_do_not_go_together(overrides, parts):
    with pytest.raises(UserError) as error:
        tiny_config(**{"model.head_dim": None, **overrides})
    for part in parts:
        assert part in str(error.value)


def test_valid_fraction_is_free_with_a_valid_source():
    assert (
        tiny_config(**{"data.valid_source": "files:x", "data.valid_fraction": 0.0}).data.valid_fraction == 0
    )


def test_group_that_is_no_group():
    assert_refused({**plain(), "model": 3}, "model: 3 is not a mapping of field names to values")


def test_model_config_is_a_static_argument():
    """Equal configs share a compiled program; every field that differs makes another."""

    @partial(jax.jit, static_argnums=0)
    def count(m):
        nonlocal traces
        traces += 1
        return m.depth

    traces = 0
    assert [int(count(m)) for m in (tiny_model(), tiny_model(), tiny_model(depth=3))] == [2, 2, 3]
    assert traces == 2
    different = {
        tiny_model(),
        *(tiny_model(**{name: value}) for name, value in [("remat", "full"), ("rope_base", 5.0)]),
    }
    assert len(different) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_model().depth = 3


def test_default_config_is_valid():
    assert config.from_config_dict(base.get_config()).model.head_dim == 32
