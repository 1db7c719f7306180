"""Fine-tuning and distillation: a step on replies alone, with adapters or a teacher, against pretraining.

A position that is no target is computed like any other, so that a step on conversations should cost what one
of pretraining does. What a teacher adds is compared with what `accounting.executed_train_flops_per_token`
predicts: 1 means that its FLOPs take as long as those of the student's own step. The last ratio is of the
study `distillation:tiny`, whose third point trains without a teacher as long as the second does with one.
"""

import dataclasses

import jax

from configs import distillation, teachers
from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from experiments.benchmarks.trainer import Trainer
from mobilellm_jax.config import Config, ModelConfig, from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.training.step import Distillation

_ROWS, _LENGTH = 16, 128
_STEPS = 3  # in a turn
_PROMPT = 0.75  # share of a row that is no target, as in conversations
_PLAIN, _REPLIES, _ADAPTERS = "pretraining", "replies alone", "adapters of rank 8"
_TEACHERS = {"a teacher of its shape": 1, "a teacher of twice its width": 2}  # times the width
_LABEL, _TAUGHT = "distillation:tiny, label", "distillation:tiny, label + teacher"
_STUDY_STEPS = 20  # in a turn: they are a hundred times shorter


def measure(quick: bool) -> list[m.Line]:
    """Measures milliseconds per step, ratios to pretraining, and bytes of the optimizer."""
    teachers = dict(list(_TEACHERS.items())[-1:]) if quick else _TEACHERS
    rows, length = (8, 32) if quick else (_ROWS, _LENGTH)
    config = config_of("12 x 128", rows, length, quick)
    adapted = dataclasses.replace(config.train, init_from="its parent", lora_rank=8)
    trainers = {
        _PLAIN: Trainer(config),
        _REPLIES: Trainer(config),
        _ADAPTERS: Trainer(dataclasses.replace(config, train=adapted)),
    }
    models = {
        name: dataclasses.replace(
            config.model,
            width=times * config.model.width,
            num_heads=times * config.model.num_heads,
            num_kv_heads=times * config.model.num_kv_heads,
            ffn_width=times * config.model.ffn_width,
        )
        for name, times in teachers.items()
    }
    trainers |= {name: Trainer(config, Distillation(of, 0.5, 1.0)) for name, of in models.items()}
    student, teacher = _study()
    trainers[_LABEL] = Trainer(student)
    trainers[_TAUGHT] = Trainer(student, Distillation(teacher, 0.5, 1.0))
    study_steps = 1 if quick else _STUDY_STEPS
    steps = {name: study_steps if name in (_LABEL, _TAUGHT) else _STEPS for name in trainers}
    batches = {
        name: trainer.random_batches(_PROMPT if name == _REPLIES else 0.0)
        for name, trainer in trainers.items()
    }
    sides = {
        name: lambda name=name, trainer=trainer: trainer.train(batches[name], steps[name])
        for name, trainer in trainers.items()
    }
    seconds = m.alternate(sides, 2 if quick else 9)
    lines = [
        m.Line(f"{name}: a step", "ms", tuple(1e3 * s / steps[name] for s in of))
        for name, of in seconds.items()
    ]
    times = {name: m.ratios(of, seconds[_PLAIN]) for name, of in seconds.items()}
    lines.append(m.Line(f"{_REPLIES} / {_PLAIN}", "x", times[_REPLIES], at_most=1.03))
    lines.append(m.Line(f"{_ADAPTERS} / {_PLAIN}", "x", times[_ADAPTERS]))
    flops = accounting.executed_train_flops_per_token
    for name, of in models.items():
        predicted = flops(config.model, length, of) / flops(config.model, length)
        lines.append(m.Line(f"{name} / {_PLAIN}", "x", times[name]))
        lines.append(m.Line(f"{name} / {_PLAIN}: predicted", "x", (predicted,)))
        share = tuple(ratio / predicted for ratio in times[name])
        lines.append(m.Line(f"{name}: measured / predicted step", "x", share, at_least=0.9, at_most=1.1))
    lines.append(m.Line(f"{_TAUGHT} / label", "x", m.ratios(seconds[_TAUGHT], seconds[_LABEL])))
    for name in (_PLAIN, _ADAPTERS):
        state = trainers[name].state.opt_state
        lines.append(m.Line(f"{name}: state of the optimizer", "MB", (_megabytes(state),)))
    return lines


def _study() -> tuple[Config, ModelConfig]:
    """The student of `distillation:tiny`, and its teacher."""
    config = distillation.get_config("tiny")
    config.train.teacher = ""
    return from_config_dict(config), from_config_dict(teachers.get_config("tiny")).model


def _megabytes(state: object) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
