"""The paper's claims, each with the judgement of our records: agree, disagree or cannot tell.

`experiments.report` writes the page, <workdir>/claims.md, from records and the paper's tables alone.
"""

from collections.abc import Hashable, Iterable
from math import hypot

from experiments.reporting import judging, literature, paper_tables
from experiments.reporting.judging import Claim, Judgement
from experiments.reporting.tables import (
    ASPECTS,
    Columns,
    aspect_ratio,
    is_outside,
    markdown_table,
    plain,
    quantity,
)
from mobilellm_jax.analysis.facts import have_base_shape
from mobilellm_jax.analysis.records import span
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import format_difference, phrase

CLAIMS = (
    Claim(
        "Deep and thin models are better than shallow and wide ones of the same size.",
        "section 2.2.2, figure 4, table 11",
        "depth_vs_width",
        paper=(
            ("30 x 512", "4 x 1280"),
            ("30 x 512", "12 x 768"),
            ("62 x 384", "30 x 512"),
            ("32 x 896", "5 x 2048"),
            ("32 x 896", "15 x 1280"),
            ("66 x 640", "32 x 896"),
        ),
        needs="any",
        in_range=True,
        note="Its deeper models have more parameters outside the embedding, 77 to 110 of 134 million; "
        "our study holds those equal.",
    ),
    Claim(
        "SwiGLU is better than ReLU.",
        "section 2.2.1, figure 3, table 10",
        "roadmap",
        (("+ SwiGLU", "ReLU baseline"),),
        (("+ SwiGLU in FFN", "Baseline model"),),
        note="The scores of the paper's ReLU model at 125M are those of the public OPT-125M.",
    ),
    Claim(
        "A deep and thin shape is better, as a step of the roadmap.",
        "figure 3, table 10",
        "roadmap",
        (("+ deep and thin", "+ SwiGLU"),),
        (("+ deep-thin structure", "+ SwiGLU in FFN"),),
    ),
    Claim(
        "Tying the embeddings saves a tenth of the parameters and costs little; "
        "spent on depth, what is saved makes up for it.",
        "section 2.2.3, table 1",
        "embedding_sharing",
        (("tied", "untied"), ("tied, * more block*", "untied")),
        (("+ emb-share", "Without emb-share"), ("+ emb-share, more depth", "Without emb-share")),
        expected="not worse",
    ),
    Claim(
        "Grouped queries make room for width, and that is better.",
        "section 2.2.4, table 10",
        "roadmap",
        (("+ grouped queries", "+ tied embeddings"),),
        (("+ Grouped-query attention (= MobileLLM)", "+ Embedding share"),),
    ),
    Claim(
        "A quarter of the key/value heads does as well as all of them.",
        "section 2.2.4, figure 5, table 13",
        "head_groups",
        (("16 x 4", "16 x 16"),),
        expected="not worse",
    ),
    Claim(
        "32 and 8 heads are worse than 16.",
        "figure 5, table 13",
        "head_groups",
        (("32 x 32", "16 x 16"), ("8 x 8", "16 x 16")),
        expected="worse",
    ),
    Claim(
        "Applying every block twice in a row is better than once.",
        "section 2.3, table 10",
        "roadmap",
        (("+ layer sharing", "+ grouped queries"),),
        (("+ Layer sharing (= MobileLLM-LS)", "+ Grouped-query attention (= MobileLLM)"),),
        note="Twice the layers cost nearly twice the FLOPs.",
    ),
    Claim(
        "Every order of applying blocks twice is better than once.",
        "section 2.3, table 2",
        "layer_sharing",
        tuple((order, "none") for order in ("immediate", "repeat_all", "reverse")),
        tuple((order, "baseline (none)") for order in ("immediate block-wise", "repeat-all-over", "reverse")),
    ),
    Claim(
        "Applying every block two to four times in a row is better than once.",
        "appendix E, table 14",
        "repeats",
        (("x2", "x1"), ("x3", "x1"), ("x4", "x1")),
        tuple((repeats, "baseline (x1)") for repeats in ("x2", "x3", "x4")),
    ),
    Claim(
        "A teacher does not help, at equal steps.",
        "section 3.5, table 16",
        "distillation",
        (("label + teacher", "label"),),
        (("Label + KD (LLaMA-v2 7B)", "Label"),),
        expected="not better",
        note="Its teacher, LLaMA-v2 7B, had seen other text; training took 2.6 to 3.2 times as long.",
    ),
    Claim(
        "Layer sharing improves the published models as well.",
        "tables 3 and 9",
        "mobilellm",
        (("*MobileLLM-LS-125M", "*MobileLLM-125M"), ("*MobileLLM-LS-350M", "*MobileLLM-350M")),  # and twins
        (("MobileLLM-LS-125M", "MobileLLM-125M"), ("MobileLLM-LS-350M", "MobileLLM-350M")),
    ),
)
# What the paper claims besides, and where. None of it has been tested here.
UNTESTED = (
    "MobileLLM beats earlier models of its size by 2.7 (125M) and 4.3 points (350M): abstract, table 3.",
    "Blocks applied twice in a row take 16.0 ms on a phone instead of 15.6, twice the blocks 29.0: table 7.",
    "8-bit weights and activations cost less than half a point: section 3.4, table 15.",
    "At 350M, API calling is as good as with LLaMA-v2 7B: section 3.3.2, table 6.",
    "Chat is better than with other models of its size: section 3.3.1, table 5.",
)
TITLE = "# What the paper claims, and what we found"
_INTRODUCTION = (
    "Written by `python -m experiments.report` from the records beside this file and the tables of [the "
    "paper](https://arxiv.org/abs/2402.14905). The paper gives the average zero-shot accuracy on eight "
    "tasks, of one run each at one learning rate. Behind ± is the standard error of a difference from the "
    "choice of their questions alone: less than that is no evidence, less than twice that is little. We "
    "compare held-out loss in nats per token, lower is better, over several seeds, each point at its own "
    "best learning rate.",
    "*Agree* and *disagree* are said where an interval that holds for all pairs of one parameterization at "
    "once excludes 0; where the claim is that something costs little, if it lies below, or above, the "
    "smallest difference that matters. A claim about several pairs needs all of them, and one refutes it. "
    "That depth has an optimum needs one better shape, and only all of the shapes that the paper covers "
    f"(width over layers {ASPECTS[0]} to {ASPECTS[1]}) refute it. A study has to say the same under two "
    "parameterizations: what it says under one alone may be about that one, and is not counted, unless all "
    "designs have the base shape, where the two are one. The rest is *cannot tell*. Very small models "
    "at the start of training say little about 125 million parameters and 0.25 trillion tokens: "
    "where they disagree, the claim may still hold at its own scale.",
)
_STAR = "A star: architecture cannot be judged at that size, as the report says first."


def page(studies: Iterable[Study]) -> str:
    """The page in Markdown, from every study at every preset."""
    studies = sorted(studies, key=lambda study: study.facts.preset)
    columns: Columns = {"claim": [], **{word: [] for word in ("agree", "disagree", "cannot tell")}}
    known: dict[Hashable, tuple[Study, str]] = {}
    pairs: list[frozenset[Hashable]] = []
    parts = []
    for claim in CLAIMS:
        judged: dict[str, list[str]] = {}
        ours = []
        for study in (study for study in studies if study.facts.study == claim.study):
            preset = plain(study.facts.preset)
            if found := judging.judgement(claim, study):
                star = "\\*" * _is_blind(study)
                judged.setdefault(found.word, []).append(preset + star)
                compared = [c for c in found.counted if c.difference]
                labels = [name for c in (*compared, *found.outside) for name in (c.point, c.other)]
                again = judging.same_runs(known, study, labels)
                ours.append(_ours(found, study, again))
                pairs += [_identity(c, study) for c in compared]
            else:
                ours.append(f"- At {preset} there are no records yet of the points it is about.")
        columns["claim"].append(claim.text)
        for word in list(columns)[1:]:
            columns[word].append(", ".join(judged.get(word, [])))
        parts += [f"## {claim.text}", _paper_says(claim), "\n".join(ours) or "Not run here."]
    head = [markdown_table(columns)]
    if any(map(_is_blind, studies)):
        head.append(_STAR)
    if unknown := [of for of in studies if any(not found.floor for found in of.verdict.regimes.values())]:
        head.append(
            f"For {len(unknown)} of the {len(studies)} studies the n-gram floor was not counted: whether "
            "architecture can show there is not known."
        )
    if twice := len(pairs) - len(set(pairs)):
        head.append(
            f"Different comparisons that these judgements rest on: {len(set(pairs))}. {twice} more compare "
            "the same designs on the same data with the same seeds, and are no evidence of their own."
        )
    parts = [TITLE, *_INTRODUCTION, *head, *parts]
    parts += filter(None, [literature.section(studies)])
    parts += ["## Not tested here", "\n".join(f"- {claim}" for claim in UNTESTED)]
    return "\n\n".join(parts) + "\n"


def _is_blind(study: Study) -> bool:
    """True if the study is known to be in a regime where architecture cannot be judged."""
    return any(regime.above_trigram or regime.is_flat for regime in study.verdict.regimes.values())


def _identity(c: Comparison, study: Study) -> frozenset[Hashable]:
    return frozenset(judging.identity(study.points[name]) for name in (c.point, c.other))


def _paper_says(claim: Claim) -> str:
    said = []
    for group, rows in paper_tables.rows(claim.study).items():
        of = {row.label: row for row in rows if row.accuracy is not None}
        changes = [
            f"{point} {of[point].accuracy} against {other} {of[other].accuracy} "
            f"({_change(of[point], of[other])})"
            for point, other in claim.paper or claim.pairs
            if point in of and other in of
        ]
        said.append(f"{group}: " * bool(group) + ", ".join(changes))
    note = f" {claim.note}" if claim.note else ""
    return f"Paper ({claim.where}), accuracy in percent: {'; '.join(said)}.{note}"


def _change(point: paper_tables.Row, other: paper_tables.Row) -> str:
    """Difference of two averages with its standard error, and whether it is within that."""
    assert point.accuracy is not None
    assert other.accuracy is not None
    change = point.accuracy - other.accuracy
    if point.error is None or other.error is None:
        return f"{change:+.1f}"
    error = hypot(point.error, other.error)
    return f"{change:+.1f} ± {error:.1f}" + (", within it" if abs(change) <= error else "")


def _ours(found: Judgement, study: Study, again: list[str]) -> str:
    """Judgement, scale, parameterization and finding."""
    facts, asked = study.facts, [*found.counted, *found.outside]
    seeds = max(c.difference.n if c.difference else 0 for c in asked)
    sizes = [run.parameters["non_embedding"] for run in study.runs]
    size = span(sizes, quantity)
    tokens = quantity(max(run.tokens_seen for run in study.runs))
    arms = [f"{arm}: {word}" for arm, word in found.by_arm.items()]
    more = (
        "as under all others at the base shape"
        if have_base_shape(study.points)
        else "and no other parameterization"
    )
    under = "; ".join(arms) + f", {more}" * (len(arms) == 1)
    parts = (
        [f"{plain('; '.join(_finding(c, facts.metric) for c in found.counted))}."] if found.counted else []
    )
    if found.outside:
        shapes = "; ".join(_finding(c, facts.metric) for c in found.outside)
        parts.append(plain(f"Not counted, of shapes that the paper does not cover: {shapes}."))
    names = dict.fromkeys(name for c in found.counted for name in (c.point, c.other))
    if far := [name for name in names if is_outside(aspect_ratio(study.points[name]))]:
        low, high = ASPECTS
        ratios = ", ".join(f"{name} {aspect_ratio(study.points[name]):.3g}" for name in far)
        parts.append(plain(f"Width over layers outside of the paper's {low} to {high}: {ratios}."))
    if again:
        parts.append(plain(f"The same design, data and seeds: {'; '.join(again)}."))
    return (
        f"- **{found.word}** at [{facts.preset}](reports/{facts.study}-{facts.preset}.md) "
        f"({size} non-embedding parameters, {tokens} tokens, {seeds} seeds, {under}): {' '.join(parts)}"
    )


def _finding(c: Comparison, metric: str) -> str:
    change = f"{format_difference(c.difference, metric)}, " if c.difference else ""
    return f"{c.point} against {c.other}: {change}{phrase(c, metric)}"
