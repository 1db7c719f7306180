"""Tables of what a verdict stands on: n-gram floors, loss by position, other documents, paired questions."""

import numpy as np

from experiments.reporting.tables import Columns, quantity
from mobilellm_jax.analysis.questions import paired_accuracies
from mobilellm_jax.analysis.regime import CONTEXT, FLAT, NGRAMS
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.wording import format_p

FLOORS = (
    "Held-out loss in nats per token beside n-grams counted on the same training tokens, and by the place of "
    f"the target in its row. Above the trigram, or where context beyond {CONTEXT} tokens is worth less than "
    f"{FLAT:g}, architecture cannot be judged."
)
TEXTS = (
    "The first interval is that of the verdict, over other seeds on the same held-out text; the second is "
    "over other documents too (95 %, two-way bootstrap, of each pair alone). The last columns are the "
    "standard errors from the choice of the seeds, and of the documents."
)
LEVELS = (
    "Right answers by level of difficulty in percent, mean over the seeds; in brackets the number of "
    "answers. Floor: what the best guess without a look at the problem gets right."
)
BITS = (
    "Bits of the facts that are stored, means over the seeds, by distinct parameters outside the embedding "
    "and by all of them. arXiv 2404.05405 finds 2 bits for each parameter of models that saw every fact "
    "1,000 times, and 1 bit after 100."
)
PAPER_BITS = 2.0
PAIRED = (
    "Difference of acc on the same questions, with a 95 % interval over other questions, and over other "
    "seeds where both have several; each alone, not corrected for their number. The standard error is "
    "clustered by question. McNemar's test is for one seed of each."
)


def levels(study: Study) -> Columns | None:
    """Right answers of a task by level, in percent, means over the seeds; None where there are no levels."""
    found = {
        label: of
        for label, point in study.points.items()
        if (of := [r.measures["levels"] for r in point.finished if r.measures and r.measures["levels"]])
    }
    if not found or any(of["level"] != one["level"] for ofs in found.values() for of in ofs for one in ofs):
        return None
    one = next(iter(found.values()))[0]
    columns: Columns = {"point": [*found, "floor"]}
    for place, (level, answers) in enumerate(zip(one["level"], one["answers"], strict=True)):
        means = [float(np.mean([of["accuracy"][place] for of in ofs])) for ofs in found.values()]
        cells = [f"{100 * share:.1f}" for share in (*means, one["floor"][place])]
        columns[f"{level} {one['name']} ({answers:,})"] = cells
    return columns


def bits(study: Study) -> Columns | None:
    """Bits stored of facts, in all and for each parameter, beside the paper's; None for other tasks."""
    names = ("bits", "bits_per_non_embedding_parameter", "bits_per_parameter")
    found = {
        label: [[run.final[name] for name in names] for run in point.finished if run.final]
        for label, point in study.points.items()
        if point.finished
        and all((run.final or {}).get(name) is not None for run in point.finished for name in names)
    }
    if not found:
        return None
    means = {label: np.mean(np.array(values, float), axis=0).tolist() for label, values in found.items()}
    return {
        "point": [*means, "paper"],
        "bits": [*(f"{of[0]:,.0f}" for of in means.values()), ""],
        "for each parameter outside the embedding": [
            *(f"{of[1]:.2f}" for of in means.values()),
            f"{PAPER_BITS:.2f}",
        ],
        "for each parameter": [*(f"{of[2]:.2f}" for of in means.values()), f"{PAPER_BITS:.2f}"],
    }


def floors(study: Study) -> Columns:
    """Loss of each design, the n-grams, and context beyond `CONTEXT` tokens; {} if none was counted."""
    found = {label: regime for label, regime in study.verdict.regimes.items() if regime.floor}
    if not found:
        return {}
    values = found.values()
    worth = [
        None if regime.near is None or regime.far is None else regime.far - regime.near for regime in values
    ]
    return {
        "point": list(found),
        "loss": [f"{regime.loss:.4f}" for regime in values],
        **{name: [f"{regime.floor[name]:.4f}" for regime in values] for name in NGRAMS},
        "counted on": [quantity(regime.tokens) for regime in values],
        f"beyond {CONTEXT} tokens": ["" if value is None else f"{value:+.4f}" for value in worth],
    }


def positions(study: Study) -> Columns:
    """Loss of each design by the place of the target in the row; {} if it was not measured."""
    found = {label: of.by_position for label, of in study.verdict.regimes.items() if of.by_position}
    if not found:
        return {}
    ends = sorted({end for places in found.values() for end in places})
    columns: Columns = {"point": list(found)}
    for before, end in zip([0, *ends], ends, strict=False):
        name = f"{end}" if end == before + 1 else f"{before + 1} to {end}"
        columns[name] = [f"{places[end]:.3f}" if end in places else "" for places in found.values()]
    return columns


def documents(study: Study) -> Columns:
    """Difference of each pair over seeds, and over other documents too; {} without records of documents."""
    pairs = [
        (c, over)
        for c, over in zip(study.verdict.comparisons, study.verdict.over_documents, strict=True)
        if over is not None
    ]
    if not pairs:
        return {}
    return {
        "pair": [f"{c.point} against {c.other}" for c, _ in pairs],
        "difference (nats/token)": [f"{over.mean:+.4f}" for _, over in pairs],
        "over other seeds": [
            _interval(c.difference.low, c.difference.high) if c.difference else "" for c, _ in pairs
        ],
        "over other documents too": [_interval(over.low, over.high) for _, over in pairs],
        "documents": [str(over.documents) for _, over in pairs],
        "of seeds": [f"{over.seeds_error:.4f}" for _, over in pairs],
        "of documents": [f"{over.documents_error:.4f}" for _, over in pairs],
    }


def _interval(low: float | None, high: float | None, scale: int = 1, digits: int = 4) -> str:
    if low is None or high is None:
        return ""
    return f"[{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"


def paired_questions(study: Study) -> Columns:
    """Differences of zero-shot accuracies on the same questions; {} where the answers were not kept."""
    found = paired_accuracies(study.points, study.verdict.comparisons)
    if not found:
        return {}
    return {
        "pair": [f"{of.point} against {of.other}" for of in found],
        "task": [f"{of.task} ({of.questions:,})" for of in found],
        "seeds": [f"{of.seeds[0]}, {of.seeds[1]}" for of in found],
        "acc, points": [f"{100 * of.mean:+.1f} {_interval(of.low, of.high, 100, 1)}".strip() for of in found],
        "standard error": [f"{100 * of.error:.1f}" for of in found],
        "McNemar's p": [
            "" if of.p_value is None else format_p(of.p_value).removeprefix("= ") for of in found
        ],
    }
