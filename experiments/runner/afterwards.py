"""What a sweep does with the finished runs of its points, once all are trained."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from experiments.runner import calling, diagnosing, looping, quantizing, questions, scoring
from experiments.runner.calling import Speaking
from experiments.runner.points import Point
from experiments.runner.questions import Questions
from experiments.runner.schemes import Quantizing
from experiments.runner.view import Tell
from mobilellm_jax.storage.files import AnyPath

Do = Callable[[Point, AnyPath, Tell], None]
Lacking = Callable[[Point, AnyPath], int]


def steps(
    asked: Questions | None,
    known: Mapping[str, str],
    quantized: Quantizing | None,
    diagnosed: bool,
    loops: Sequence[int],
    speaking: Speaking | None,
) -> Iterator[tuple[Do, Lacking]]:
    """What to do for the finished runs of every point, and how many of them lack it.

    Arguments are those of `sweeping.sweep`; `known` is what `questions.load` returns.
    """

    def step(do: Callable[..., None], lacking: Callable[..., int], **what: object) -> tuple[Do, Lacking]:
        return functools.partial(do, **what), functools.partial(lacking, **what)

    if asked:
        yield step(scoring.score_point, questions.lacking, questions=asked, known=known)
    if quantized:
        yield step(quantizing.quantize_point, quantizing.lacking, asked=quantized)
    if diagnosed:
        yield step(diagnosing.diagnose_point, diagnosing.lacking)
    if loops:
        yield step(looping.score_point, looping.lacking, counts=loops)
    if speaking:
        yield step(calling.ask_point, calling.lacking, asked=speaking)
