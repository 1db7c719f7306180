"""The paper's claims beside what our records say about them: agree, disagree or cannot tell.

`experiments.report` writes the page, <workdir>/README.md, from records and the paper's tables alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from experiments.reporting import paper_tables
from experiments.reporting.tables import Columns, markdown_table, plain, quantity
from mobilellm_jax.analysis.records import Record, by_point, newest
from mobilellm_jax.analysis.verdicts import Comparison, Verdict
from mobilellm_jax.analysis.wording import format_difference

Pairs = Sequence[tuple[int, int]]  # (point, other) by their places in the study
# For each expectation: the words of a verdict that are for it, and those against it.
SUPPORTS = {"better": {"better"}, "worse": {"worse"}, "not worse": {"better", "no difference"}}
CONTRADICTS = {"better": {"worse"}, "worse": {"better"}, "not worse": {"worse"}}


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that the paper says about shapes, and the comparisons that test it.

    Attributes:
      text, where: what is claimed, and where.
      study: the study that tests it.
      pairs: the comparisons; the claim is that the first is `expected` compared with the second. Empty: all
        that the study asks about.
      paper: the same in the paper's table, by size group, where its rows are not those of the study.
      expected: "better", "worse" or "not worse".
      note: what weakens the paper's evidence.
    """

    text: str
    where: str
    study: str
    pairs: Pairs = ()
    paper: Mapping[str, Pairs] = dataclasses.field(default_factory=dict)
    expected: str = "better"
    note: str = ""


CLAIMS = (
    Claim(
        "Deep and thin models are better than shallow and wide ones of the same size.",
        "section 2.2.2, figure 4, table 11",
        "depth_vs_width",
        paper={"125M": ((6, 0), (6, 3), (8, 6)), "350M": ((7, 0), (7, 3), (9, 7))},
        note="Its deeper models have more parameters outside the embedding, 77 to 110 of 134 million; "
        "our study holds those equal.",
    ),
    Claim(
        "SwiGLU is better than ReLU.",
        "section 2.2.1, figure 3, table 10",
        "roadmap",
        ((1, 0),),
        note="The scores of the paper's ReLU model at 125M are those of the public OPT-125M.",
    ),
    Claim(
        "A deep and thin shape is better, as a step of the roadmap.",
        "figure 3, table 10",
        "roadmap",
        ((2, 1),),
    ),
    Claim(
        "Tying the embeddings saves a tenth of the parameters and costs little; "
        "spent on depth, what is saved makes up for it.",
        "section 2.2.3, table 1",
        "embedding_sharing",
        ((1, 0), (2, 0)),
        expected="not worse",
    ),
    Claim(
        "Grouped queries make room for width, and that is better.",
        "section 2.2.4, table 10",
        "roadmap",
        ((4, 3),),
    ),
    Claim(
        "A quarter of the key/value heads does as well as all of them.",
        "section 2.2.4, figure 5, table 13",
        "head_groups",
        ((8, 6),),
        expected="not worse",
    ),
    Claim(
        "32 and 8 heads are worse than 16.",
        "figure 5, table 13",
        "head_groups",
        ((0, 6), (11, 6)),
        expected="worse",
    ),
    Claim(
        "Applying every block twice in a row is better than once.",
        "section 2.3, table 10",
        "roadmap",
        ((5, 4),),
        note="Twice the layers cost nearly twice the FLOPs.",
    ),
    Claim(
        "Every order of applying blocks twice is better than once.",
        "section 2.3, table 2",
        "layer_sharing",
        ((1, 0), (2, 0), (3, 0)),
    ),
    Claim(
        "Applying every block two to four times in a row is better than once.",
        "appendix E, table 14",
        "repeats",
        ((1, 0), (2, 0), (3, 0)),
    ),
    Claim(
        "Layer sharing improves the published models as well.",
        "tables 3 and 9",
        "mobilellm",
        ((1, 0), (3, 2)),
    ),
)
# What the paper claims besides, and where. None of it has been tested here.
UNTESTED = (
    "MobileLLM beats earlier models of its size by 2.7 (125M) and 4.3 points (350M): abstract, table 3.",
    "Blocks applied twice in a row take 16.0 ms on a phone instead of 15.6, twice the blocks 29.0: table 7.",
    "8-bit weights and activations cost less than half a point: section 3.4, table 15.",
    "Distillation from LLaMA-v2 7B does not help, and takes 2.6 to 3.2 times as long: section 3.5, table 16.",
    "At 350M, API calling is as good as with LLaMA-v2 7B: section 3.3.2, table 6.",
    "Chat is better than with other models of its size: section 3.3.1, table 5.",
)
TITLE = "# What the paper claims, and what we found"
_INTRODUCTION = (
    "Written by `python -m experiments.report` from the records beside this file and the tables of [the "
    "paper](https://arxiv.org/abs/2402.14905). The paper gives the average zero-shot accuracy on eight "
    "tasks, of one run each at one learning rate. We compare held-out loss in nats per token, lower is "
    "better, over several seeds, each point at its own best learning rate.",
    "*Agree* and *disagree* are said where a difference is significant after Holm's correction, or "
    "shown to be too small to matter where that is the claim; the rest is *cannot tell*. Very small "
    "models at the start of training say little about 125 million parameters and 0.25 trillion tokens: "
    "where they disagree, the claim may still hold at its own scale.",
)


def page(studies: Iterable[tuple[Sequence[Record], Verdict]]) -> str:
    """Returns the page in Markdown, from the records and the verdict of every study at every preset."""
    studies = sorted(studies, key=lambda study: newest(study[0]).preset)
    columns: Columns = {"claim": [], **{word: [] for word in ("agree", "disagree", "cannot tell")}}
    parts = []
    for claim in CLAIMS:
        judged: dict[str, list[str]] = {}
        ours = []
        for records, verdict in studies:
            facts, asked = newest(records), _asked(claim, records, verdict)
            if facts.study == claim.study and not asked:
                ours.append(f"- At {plain(facts.preset)} there are no records yet of the points it is about.")
            elif asked:
                word = judge([c.word for c in asked], claim.expected)
                judged.setdefault(word, []).append(plain(facts.preset))
                ours.append(_ours(word, records, asked))
        columns["claim"].append(claim.text)
        for word in list(columns)[1:]:
            columns[word].append(", ".join(judged.get(word, [])))
        parts += [f"## {claim.text}", _paper_says(claim), "\n".join(ours) or "Not run here."]
    parts = [TITLE, *_INTRODUCTION, markdown_table(columns), *parts]
    parts += ["## Not tested here", "\n".join(f"- {claim}" for claim in UNTESTED)]
    return "\n\n".join(parts) + "\n"


def judge(words: Sequence[str], expected: str) -> str:
    """Returns "agree", "disagree" or "cannot tell" from the words of the comparisons.

    One significant comparison for the claim, and none against it, is enough to agree; the other way round, to
    disagree.
    """
    supported = any(word in SUPPORTS[expected] for word in words)
    contradicted = any(word in CONTRADICTS[expected] for word in words)
    if supported == contradicted:
        return "cannot tell"
    return "agree" if supported else "disagree"


def _paper_says(claim: Claim) -> str:
    said = []
    for group, rows in paper_tables.rows(claim.study).items():
        changes = []
        for point, other in claim.paper.get(group, claim.pairs):
            first, second = rows[point], rows[other]
            if first.accuracy is not None and second.accuracy is not None:
                change = first.accuracy - second.accuracy
                changes.append(
                    f"{first.label} {first.accuracy} against {second.label} {second.accuracy} ({change:+.1f})"
                )
        said.append(f"{group}: " * bool(group) + ", ".join(changes))
    note = f" {claim.note}" if claim.note else ""
    return f"Paper ({claim.where}), accuracy in percent: {'; '.join(said)}.{note}"


def _asked(claim: Claim, records: Sequence[Record], verdict: Verdict) -> list[Comparison]:
    """Returns the comparisons of a study that test the claim; [] if it is another study's."""
    if newest(records).study != claim.study:
        return []
    places = {point: runs[0].point_index for point, runs in by_point(records).items()}
    return [
        c
        for c in verdict.comparisons
        if not claim.pairs or (places.get(c.point), places.get(c.other)) in claim.pairs
    ]


def _ours(judged: str, records: Sequence[Record], asked: Sequence[Comparison]) -> str:
    """Returns judgement, scale and finding."""
    facts, seeds = newest(records), max(c.difference.n if c.difference else 0 for c in asked)
    sizes = [record.parameters["non_embedding"] for record in records]
    size = " to ".join(dict.fromkeys(quantity(number) for number in (min(sizes), max(sizes))))
    tokens = quantity(max(record.tokens_seen for record in records))
    return (
        f"- **{judged}** at [{facts.preset}](reports/{facts.study}-{facts.preset}.md) "
        f"({size} non-embedding parameters, {tokens} tokens, {seeds} seeds): "
        f"{plain('; '.join(map(_finding, asked)))}."
    )


def _finding(c: Comparison) -> str:
    if c.difference is None:
        return f"{c.point} against {c.other}: {c.phrase}"
    return f"{c.point} against {c.other}: {format_difference(c.difference, 'loss')}, {c.phrase}"
