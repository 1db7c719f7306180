"""The page of claims: what the paper's tables say, what the records say, and the judgement."""

from fnmatch import fnmatchcase

import pytest
from test_results import make_record

from experiments.reporting import claims, paper_tables
from experiments.runner.studies import points_of
from mobilellm_jax.analysis.study import study_of


@pytest.mark.parametrize(
    ("words", "expected", "judged"),
    [
        (["better"], "better", "agree"),
        (["cannot tell", "better"], "better", "agree"),
        (["worse", "cannot tell"], "better", "disagree"),
        (["worse", "better"], "better", "cannot tell"),
        (["cannot tell"], "better", "cannot tell"),
        (["no difference"], "better", "cannot tell"),  # smaller than matters, but perhaps there
        (["no difference"], "not worse", "agree"),
        (["worse"], "not worse", "disagree"),
        (["worse"], "worse", "agree"),
        (["better"], "worse", "disagree"),
    ],
)
def test_judgement(words, expected, judged):
    assert claims.judge(words, expected) == judged


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text)
def test_the_study_of_a_claim_asks_about_its_pairs(claim, preset):
    points = points_of(f"configs/{claim.study}.py:{preset}", {}, None, ())
    asked = [pair for point in points for pair in point.facts["pairs"]]
    for point, other in claim.pairs:
        assert [pair for pair in asked if fnmatchcase(pair[0], point) and fnmatchcase(pair[1], other)]


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text)
def test_the_paper_has_the_pairs_of_a_claim(claim):
    groups = [{row.label for row in rows} for rows in paper_tables.rows(claim.study).values()]
    pairs = claim.paper or claim.pairs
    assert pairs
    for pair in pairs:
        assert any({*pair} <= labels for labels in groups), pair


LABELS = {1: "untied", 2: "tied", 4: "tied, 2 more blocks"}


def three_seeds(depth, score, **changes):
    return [
        make_record(
            depth=depth,
            point=LABELS[depth],
            point_index=list(LABELS).index(depth),
            seed=seed,
            score=score + 0.001 * seed * depth,
            pairs=[["tied", "untied"], ["tied, 2 more blocks", "untied"]],
            **changes,
        )
        for seed in range(3)
    ]


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_page_says_what_paper_and_records_say():
    records = [
        run
        for depth, score in ((1, 3.5), (2, 3.3), (4, 3.6))
        for run in three_seeds(depth, score, study="embedding_sharing")
    ]
    text = claims.page([study_of(records)])
    tying = section(
        text,
        "Tying the embeddings saves a tenth of the parameters and costs little; "
        "spent on depth, what is saved makes up for it.",
    )
    # table 1 of the paper, by hand
    assert "125M: + emb-share 44.6 against Without emb-share 44.8 (-0.2), " in tying
    assert "+ emb-share, more depth 45.0 against Without emb-share 44.8 (+0.2)." in tying
    assert "- **cannot tell** at [tiny](reports/embedding_sharing-tiny.md)" in tying  # one for, one against
    assert "750 k non-embedding parameters, 2.05 M tokens, 3 seeds" in tying
    assert "tied against untied: -0.1990" in tying
    assert "worse" in tying
    assert "Not run here." in section(text, "SwiGLU is better than ReLU.")
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(claims.CLAIMS)
    assert [row for row in rows if row.endswith("|  |  | tiny |")] == [rows[2 + 3]]
    only_tied = [run for run in records if run.x["value"] == 2]
    missing = claims.page([study_of(only_tied)])
    assert "- At tiny there are no records yet of the points it is about." in missing
    assert section(text, "Not tested here").count("- ") == len(claims.UNTESTED)
