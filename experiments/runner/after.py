"""What a sweep does with the finished runs of its points, beside comparing them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from experiments.runner import calling, diagnosing, looping, quantizing, questions, samples, scoring
from experiments.runner.calling import Speaking
from experiments.runner.points import Point
from experiments.runner.questions import Questions
from experiments.runner.schemes import Quantizing
from experiments.runner.view import Tell
from mobilellm_jax.storage.files import AnyPath

Do = Callable[[Point, AnyPath, Tell], None]


def check(
    points: Sequence[Point],
    asked: Questions | None,
    quantized: Quantizing | None,
    prompts: Sequence[str],
    speaking: Speaking | None,
) -> dict[str, str]:
    """Checks that all of it can be asked of the points, before they train; returns `questions.load`.

    Raises:
      UserError: a point has no tokenizer or weights for it, or as in `questions.load`.
    """
    for point in points:
        if quantized:
            quantized.check(point.config)
        if speaking:
            speaking.check(point.config)
    if prompts:
        samples.check(points)
    return questions.load(asked, points) if asked else {}


def tasks(
    asked: Questions | None,
    known: Mapping[str, str],
    quantized: Quantizing | None,
    diagnosed: bool,
    loops: Sequence[int],
    prompts: Sequence[str],
    speaking: Speaking | None,
) -> Iterator[tuple[Do, Callable[[Point, AnyPath], int]]]:
    """What to do for the finished runs of every point, and how many of them lack it."""
    if asked:
        these = {"questions": asked, "known": known}
        yield functools.partial(scoring.score_point, **these), functools.partial(questions.lacking, **these)
    if quantized:
        yield (
            functools.partial(quantizing.quantize_point, asked=quantized),
            functools.partial(quantizing.lacking, asked=quantized),
        )
    if diagnosed:
        yield diagnosing.diagnose_point, diagnosing.lacking
    if loops:
        yield (
            functools.partial(looping.score_point, counts=loops),
            functools.partial(looping.lacking, counts=loops),
        )
    if prompts:
        yield (
            functools.partial(samples.sample_point, prompts=prompts),
            functools.partial(samples.lacking, prompts=prompts),
        )
    if speaking:
        yield (
            functools.partial(calling.ask_point, asked=speaking),
            functools.partial(calling.lacking, asked=speaking),
        )
