"""Distillation: MobileLLM table 16, and the comparison at equal time that it leaves out.

  python -m experiments.train --config=configs/teachers.py:tiny --workdir=runs/teacher_tiny
  python -m experiments.sweep --config=configs/distillation.py:tiny

The points have one shape. `label` learns from the tokens; `label + teacher` from tokens and teacher in
equal parts, for as many steps. The others learn from the tokens for as long as `label + teacher` takes, or
for as many FLOPs: what the teacher would have bought. How long a step of each took, the report says.

`tiny` has a teacher of another shape, trained on the same text by the first command. With it a step has 2.76
times the FLOPs, and takes 1.8 times as long on 2 cores (`bench --only=finetuning`), as larger products run at
a higher rate; on one core 2.2 times, as the report says. It cannot show what a teacher passes on that has
seen other text than its student.

`paper_125m` and `paper_350m` are the rows of table 16: accuracies of 43.9 and 43.8, 49.1 and 48.8 (label,
label and teacher). The teacher is LLaMA-v2 7B, to be imported, and its tokenizer that of all points. The
paper states neither the weight of the two losses nor the shapes: the scores of its first row are those of
12 x 768 in tables 10 and 11, so these are the SwiGLU models of table 10. Its hours on 32 A100, 29 and 93,
and 42 and 109, are ratios of 3.2 and 2.6, far below that of the FLOPs with such a teacher; equal time
goes by its hours.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base

PRESETS = ("tiny", "paper_125m", "paper_350m")
_PAPER = {"paper_125m": (12, 12, 768), "paper_350m": (15, 20, 1280)}  # depth, num_heads, width
_LABELS = ("label", "label + teacher", "label, equal time", "label, equal FLOPs")
# Of a step with the teacher, in steps without. The time of `tiny` was measured; the paper gives hours.
TIME = {"tiny": 1.8, "paper_125m": 93 / 29, "paper_350m": 109 / 42}
FLOPS = {"tiny": 2.76}


def get_config(preset: str = "tiny") -> ConfigDict:
    """Config that all points share."""
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    base.use_recipe(config, preset)
    model = config.model
    if preset in _PAPER:
        model.depth, model.num_heads, model.width = _PAPER[preset]
        model.share_embedding = False  # as in table 10
        config.train.teacher = "runs/llama2_7b"
        config.data.tokenizer = "sentencepiece:runs/llama2_7b/tokenizer/tokenizer.model"
    else:
        model.depth, model.num_heads, model.width, model.ffn_width = 3, 4, 64, 192
        base.use_base_shape(config, model.depth, model.width)
        config.train.teacher = "runs/teacher_tiny"
    return config


def study(preset: str) -> base.Study:
    teacher = "runs/teacher_tiny"
    makes = f"train --config=configs/teachers.py:tiny --workdir={teacher}"
    if preset in _PAPER:
        teacher = "runs/llama2_7b"
        makes = f"import_hf --source=<folder of Llama-2-7b-hf> --workdir={teacher}"
    labels = _LABELS[: 2 + len(_longer(preset))]
    return base.Study(
        question="Does a teacher pay, at equal steps and at equal time?",
        scientific=("train.teacher_weight", "train.steps"),
        labels=labels,
        pairs=[(labels[1], other) for other in labels if other != labels[1]],
        matched="total_parameters",
        tolerance=0.0,
        makes={teacher: f"python -m experiments.{makes}"},
        **{**base.protocol(preset), **({} if preset in _PAPER else {"arms": base.COMPLETEP})},
    )


def sweep(preset: str) -> Iterator[base.Overrides]:
    """Yields the overrides of each point."""
    steps = get_config(preset).train.steps
    yield {"train.teacher_weight": 0.0, "train.steps": steps}
    yield {"train.teacher_weight": 0.5, "train.steps": steps}
    for ratio in _longer(preset):
        yield {"train.teacher_weight": 0.0, "train.steps": round(ratio * steps)}


def _longer(preset: str) -> list[float]:
    """Steps of the longer points, in those of the others: for equal time, and where known for equal FLOPs."""
    return [ratios[preset] for ratios in (TIME, FLOPS) if preset in ratios]
