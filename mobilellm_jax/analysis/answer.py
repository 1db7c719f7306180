"""The answer to a study's question: in one short sentence, for titles, and in plain words, for readers."""

import math
import re
from collections.abc import Sequence

from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import format_bound, format_drift, format_score, join, sole_arm

_MOST = 3  # names or findings in one sentence
# Fields that labels of two numbers, "4 x 48", may stand for.
_READ = (
    ("depth", "width", "blocks x width"),
    ("num_heads", "num_kv_heads", "heads x key/value heads"),
)


def answer(study: Study) -> str:
    """The finding in one short sentence without a full stop.

    Where there are several parameterizations, only what they agree on is a finding. Designs that share no
    budget are not to be ranked: their study is about how the best learning rate moves.
    """
    if _is_of_rates(study):
        return "; ".join(map(format_drift, study.verdict.drifts))
    found = _findings(study)
    if not found:
        return _without_pairs(study)
    baselines = {other for _, other, _ in found}
    if len(found) == 1 or len(baselines) > 1:
        return _of_pairs(found)
    return _against(baselines.pop(), {point: word for point, _, word in found})


def in_words(study: Study) -> str:
    """The answer with its size, and whether it can be an answer at all: one paragraph."""
    said = answer(study)
    arm = sole_arm(study.points) if study.verdict.comparisons else ""
    sizes = "" if _is_of_rates(study) else _sizes(study)
    notes = "; ".join(filter(None, [sizes, f"under {arm} alone" if arm else ""]))
    blind = any(of.above_trigram or of.is_flat for of in study.verdict.regimes.values())
    parts = [f"{said} ({notes})." if notes else f"{said}."]
    if blind:
        parts.append("But architecture cannot be judged at this size and length, see the first warning.")
    return " ".join(parts)


def reading(study: Study) -> str:
    """How to read the answer: what a finding takes, and what labels mean; "" where both are plain."""
    arms = [family.arm for family in study.verdict.families if family.arm]
    counts = f"A finding counts where it holds under {join(arms)}." if len(arms) > 1 else ""
    return " ".join(filter(None, [counts, labels(study)]))


def labels(study: Study) -> str:
    """How labels of two numbers are read, by what they agree with in the configs; "" for other labels."""
    pairs = {
        label: (int(found[1]), int(found[2]))
        for label in study.points
        if (found := re.match(r"(\d+) x (\d+)\b", label))
    }
    for first, second, meaning in _READ:
        models = {label: study.points[label].config["model"] for label in pairs}
        known = {label: (model.get(first), model.get(second)) for label, model in models.items()}
        if pairs and known == pairs:
            return f"Read {next(iter(pairs))!r} as {meaning}."
    return ""


def _is_of_rates(study: Study) -> bool:
    return study.facts.matched == "tokens" and bool(study.verdict.drifts)


def _findings(study: Study) -> list[tuple[str, str, str]]:
    """Point, other and word of every pair; of designs, where there are several parameterizations."""
    if study.verdict.joint:
        return [(of.design, of.other, of.word) for of in study.verdict.joint]
    return [(c.point, c.other, c.word) for c in study.verdict.comparisons]


def _against(baseline: str, words: dict[str, str]) -> str:
    """All designs are compared with one."""
    better, worse = ([point for point, word in words.items() if word == of] for of in ("better", "worse"))
    rest = [point for point in words if point not in (*better, *worse)]
    parts = []
    if better:
        parts.append(f"{_names(better)} {_are(better)} better than {baseline!r}")
    else:
        parts.append(f"None of {len(words)} designs is shown to be better than {baseline!r}")
    if worse:
        parts.append(f"{_names(worse)} {_are(worse)} worse")
    if rest and (better or worse):
        parts.append(f"{_names(rest)} {_are(rest)} {_open({words[point] for point in rest})}")
    return "; ".join(parts)


def _of_pairs(found: Sequence[tuple[str, str, str]]) -> str:
    decided = [(a, b) if word == "better" else (b, a) for a, b, word in found if word in ("better", "worse")]
    rest = [(a, b, word) for a, b, word in found if word not in ("better", "worse")]
    if len(found) == 1 and rest:
        ((a, b, word),) = rest
        return f"{a!r} and {b!r}: {word}"
    if not decided:
        return f"None of {len(found)} pairs shows which design is better"
    winners: dict[str, list[str]] = {}
    for winner, loser in decided[:_MOST]:
        winners.setdefault(loser, []).append(winner)
    parts = [f"{_names(of)} {_are(of)} better than {loser!r}" for loser, of in winners.items()]
    if (more := len(decided) - _MOST) > 0:
        parts.append(f"{more} more differ{'s' * (more == 1)}")
    if rest:
        parts.append(f"{len(rest)} of {len(found)} pairs {_are(rest)} {_open({word for _, _, word in rest})}")
    return "; ".join(parts)


def _without_pairs(study: Study) -> str:
    estimates = study.verdict.estimates
    if not estimates:
        return "No run has finished"
    metric = study.facts.metric
    measure = MEASURES[metric]
    best = min(estimates, key=lambda label: estimates[label].mean)
    value = f"{measure.shown(estimates[best].mean):.{measure.digits}f} {measure.unit_of_mean}"
    if len(estimates) == 1:
        noise, n = study.verdict.noise[best], estimates[best].n
        spread = f", standard deviation {format_score(noise, metric)} over {n} seeds" if noise else ""
        return f"{best!r}: {value}{spread}"
    return f"{best!r} ends best, at {value}"


def _sizes(study: Study) -> str:
    """The range of the differences that are findings, and what the largest means."""
    metric, joint = study.facts.metric, {(of.design, of.other): of.word for of in study.verdict.joint}
    counted = [c for c in study.verdict.comparisons if _counts(c, joint)]
    found = sorted(abs(c.difference.mean) for c in counted if c.difference)
    if not found:
        bounds = [c.bound for c in study.verdict.comparisons]
        if len(bounds) == 1 and bounds[0] is not None:
            return f"none larger than {format_bound(bounds[0], metric)} {_unit(metric)}"
        return ""
    by = " to ".join(dict.fromkeys(format_score(size, metric) for size in (found[0], found[-1])))
    ratio = f", up to {math.expm1(found[-1]):.1%} in perplexity" if metric == "loss" else ""
    return f"differences of {by} {_unit(metric)}{ratio}"


def _counts(c: Comparison, joint: dict[tuple[str, str], str]) -> bool:
    return c.word in ("better", "worse") and (not joint or joint.get(c.designs) == c.word)


def _unit(metric: str) -> str:
    return MEASURES[metric].unit.partition(" (")[0]


def _open(words: set[str]) -> str:
    """What pairs that are not decided are, in few words."""
    short = {"no difference": "equal to within what matters"}
    return " or ".join(dict.fromkeys(short.get(word, "undecided") for word in sorted(words)))


def _names(names: Sequence[str]) -> str:
    return join([repr(name) for name in names]) if len(names) <= _MOST else f"{len(names)} designs"


def _are(names: Sequence[object]) -> str:
    return "is" if len(names) == 1 else "are"
