"""Which configs share compiled programs: those of equal keys have equal programs, and no others do."""

import jax
import pytest
from conftest import tiny_config

from mobilellm_jax.config import COMPILED, ROLES, Config
from mobilellm_jax.parallel import partition
from mobilellm_jax.training.programs import compile_key, make_programs

TASK = {"data.source": "khop:hops=1,min_hops=1,symbols=4,queries=1", "train.eval_rows": 8}
# Another value of every field that programs do not depend on.
OTHER = {
    "data.source": "files:x",
    "data.valid_source": "files:y",
    "data.valid_fraction": 0.3,
    "data.text_field": "body",
    "data.tokenizer": "bytes",
    "data.cache_dir": "elsewhere",
    "optimizer.learning_rate": 0.5,
    "optimizer.schedule": "wsd",
    "optimizer.warmup_steps": 3,
    "optimizer.final_fraction": 0.4,
    "optimizer.decay_fraction": 0.7,
    "train.init_from": "elsewhere",
    "train.grow": "",  # does not go with resize_embedding; has a case of its own
    "train.resume_optimizer": False,  # does not go with resize_embedding either
    "train.resize_embedding": True,
    "train.teacher": "elsewhere",
    "train.teacher_weight": 0.25,
    "train.teacher_temperature": 2.0,
    "train.steps": 20,
    "train.init_seed": 5,
    "train.data_seed": 6,
    "train.eval_every": 7,
    "train.eval_rows": 16,
    "train.eval_split": "tuning",
    "train.checkpoint_every": 9,
    "train.log_every": 11,
    "train.writers": "",
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}
# Another value of every field that they do depend on, with other fields where those give it a meaning.
COMPLETEP, MUON = {"model.parameterization": "completep"}, {"optimizer.name": "muon"}
LOOPED = {"model.sharing": "immediate", "model.num_repeats": 2}
LORA = {"train.init_from": "elsewhere", "train.lora_rank": 3}
ONE_BY_ONE = {
    "model.vocab_size": (64, {}),
    "model.depth": (3, {}),
    "model.width": (32, {}),
    "model.num_heads": (2, {}),
    "model.num_kv_heads": (4, {}),
    "model.head_dim": (12, {}),
    "model.ffn_kind": ("relu", {}),
    "model.ffn_width": (40, {}),
    "model.share_embedding": (False, {}),
    "model.sharing": ("0 1 0", {}),
    "model.num_repeats": (3, {"model.sharing": "immediate"}),
    "model.rope_base": (5e5, {}),
    "model.norm_epsilon": (1e-3, {}),
    "model.init_std": (0.5, {}),
    "model.parameterization": ("mup", {}),
    "model.base_width": (64, COMPLETEP),
    "model.base_depth": (8, COMPLETEP),
    "model.compute_dtype": ("bfloat16", {}),
    "model.loop_gains": (True, LOOPED),
    "model.loop_rank": (2, LOOPED),
    "model.loop_targets": ("query", LOOPED | {"model.loop_rank": 2}),
    "model.loop_scale": ("learned", LOOPED),
    "model.loop_embedding": (True, LOOPED),
    "model.loop_norm": (True, LOOPED),
    "model.attention": ("splash", {}),
    "model.remat": ("full", {}),
    "model.scan_unroll": (2, {}),
    "model.loss_chunk": (3, {}),
    "data.sequence_length": (12, {}),
    "optimizer.name": ("muon", {}),
    "optimizer.beta1": (0.5, {}),
    "optimizer.beta2": (0.5, {}),
    "optimizer.epsilon": (1e-3, {}),
    "optimizer.momentum": (0.5, MUON),
    "optimizer.weight_decay": (0.5, {}),
    "optimizer.clip_norm": (0.5, {}),
    "train.lora_rank": (2, {"train.init_from": "elsewhere"}),
    "train.lora_targets": ("query", LORA),
    "train.lora_alpha": (8.0, LORA),
    "train.batch_size": (16, {}),
    "train.accumulation_steps": (2, {}),
    "train.eval_batch_size": (16, {}),
    "train.quantize": ("w4", {}),
    "train.loops": ("1..3", {"model.sharing": "immediate"}),
}


def lowered(config: Config) -> list[str]:
    """The text of the three programs of a run on one device."""
    programs = make_programs(config, partition.make_mesh(tiny_config().mesh, jax.devices()[:1]))
    return [
        programs.init.lower(jax.random.key(0)).as_text(),
        programs.trace_step().lower().as_text(),
        programs.evaluate.lower(programs.state.params, programs.eval_rows).as_text(),
    ]


def test_the_cases_are_all_fields():
    assert set(OTHER) == set(ROLES) - COMPILED
    assert set(ONE_BY_ONE) == COMPILED


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, OTHER),
        # Fine-tuning on replies costs what pretraining does.
        ({}, {"train.init_from": "elsewhere", "data.source": "conversations:x"}),
        ({"train.init_from": "here"}, {"train.init_from": "elsewhere", "train.grow": "unroll"}),
        ({"train.init_from": "here"}, {"train.init_from": "elsewhere", "train.resume_optimizer": True}),
        (
            TASK,
            OTHER | TASK | {"data.source": TASK["data.source"].replace("4", "5"), "data.valid_source": ""},
        ),
    ],
    ids=["text", "conversations", "growing", "resuming", "task"],
)
def test_equal_keys_mean_equal_programs(one, other):
    one, other = tiny_config(**one), tiny_config(**other)
    assert one != other
    assert compile_key(one) == compile_key(other)
    assert hash(compile_key(one)) == hash(compile_key(other))
    assert lowered(one) == lowered(other)


def test_evaluation_of_a_task_is_another_program():
    text, task = tiny_config(), tiny_config(**TASK)
    assert compile_key(text) != compile_key(task)
    assert [a == b for a, b in zip(lowered(text), lowered(task), strict=True)] == [True, True, False]


def with_and_without(name: str) -> tuple[Config, Config]:
    value, beside = ONE_BY_ONE[name]
    return tiny_config(**beside), tiny_config(**beside, **{name: value})


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_every_other_field_means_another_key(name):
    one, other = map(compile_key, with_and_without(name))
    assert one != other


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in ONE_BY_ONE if name != "model.attention"]
)  # see test_lowering
def test_every_other_field_means_another_program(name):
    one, other = map(lowered, with_and_without(name))
    assert one != other
