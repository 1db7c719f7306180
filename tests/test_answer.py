"""The answer of a study in words, and the names of small twins of published models."""

import dataclasses
import re

import pytest
from test_results import make_record, make_tuning

from mobilellm_jax.analysis import answer, twins
from mobilellm_jax.analysis.study import study_of

NOISE = (0.0, 0.003, -0.002, 0.001)


def study(scores, pairs, **changes):
    """A study of categories with little noise; `scores` by label."""
    return study_of(
        [
            make_record(
                point=label,
                point_index=i,
                seed=seed,
                score=score + NOISE[(seed + i) % 4],
                x=None,
                pairs=pairs,
                **changes,
            )
            for i, (label, score) in enumerate(scores.items())
            for seed in range(4)
        ]
    )


@pytest.mark.parametrize(
    ("scores", "pairs", "said"),
    [
        ({"a": 3.5, "b": 3.4, "c": 3.6}, ["ba", "ca"], "'b' is better than 'a'; 'c' is worse"),
        (
            {"a": 3.5, "b": 3.6, "c": 3.5},
            ["ba", "ca"],
            "None of 2 designs is shown to be better than 'a'; 'b' is worse; "
            "'c' is equal to within what matters",
        ),
        ({"a": 3.5, "b": 3.4, "c": 3.3}, ["ba", "cb"], "'b' is better than 'a'; 'c' is better than 'b'"),
        ({"a": 3.5, "b": 3.5, "c": 3.5}, ["ba", "cb"], "None of 2 pairs shows which design is better"),
        ({"a": 3.5, "b": 3.5}, ["ba"], "'b' and 'a': no difference"),
        ({"a": 3.5, "b": 3.4}, [], "'b' ends best, at 3.4005 nats per token"),
    ],
)
def test_answer_is_one_short_sentence(scores, pairs, said):
    assert answer.answer(study(scores, [list(pair) for pair in pairs])) == said


def test_answer_in_words_has_the_size_of_what_was_found():
    words = answer.in_words(study({"a": 3.5, "b": 3.4, "c": 3.3}, [["b", "a"], ["c", "a"]]))
    assert words == (
        "'b' and 'c' are better than 'a' (differences of 0.1000 to 0.2000 nats per token, up to 22.1% in "
        "perplexity)."
    )
    assert "cannot be judged" in answer.in_words(study({"a": 5.5, "b": 5.4}, [["b", "a"]]))  # above a trigram


def test_answer_in_words_names_the_only_parameterization():
    """At the base shape there is none to name, as all are one there."""
    for base, said in (
        ({}, "; under mup alone)."),
        ({"base_depth": 4, "base_width": 128}, "in perplexity)."),
    ):
        model = {**make_record().config["model"], "parameterization": "mup", **base}
        config = {**make_record().config, "model": model}
        assert answer.in_words(study({"a": 3.5, "b": 3.4}, [["b", "a"]], config=config)).endswith(said)


def test_designs_of_different_size_are_not_ranked_where_rates_are_the_question():
    """The answer is how the best rate moves; without a search, there is no such answer."""
    changes = {"matched": "tokens", "tuning": "fitted", "pairs": [["8 x 128", "2 x 128"]]}
    records = [
        run
        for depth, best in ((2, 4e-3), (4, 2.8e-3), (8, 2e-3))
        for run in (
            *make_tuning(depth=depth, best=best, score=4 - 0.1 * depth, **changes),
            *(
                make_record(
                    depth=depth, seed=s, score=4 - 0.1 * depth + NOISE[(s + depth // 2) % 4], **changes
                )
                for s in range(4)
            ),
        )
    ]
    said = answer.in_words(study_of(records))
    assert re.match(
        r"The best learning rate moves by -0\.[45]\d \[.*\] octaves for each doubling of depth", said
    )
    assert "better" not in said
    ranked = answer.in_words(study_of([run for run in records if run.phase == "comparison"]))
    assert "better" in ranked


def test_labels_of_two_numbers_are_explained_only_where_the_configs_agree():
    heads = {"num_heads": 8, "num_kv_heads": 4}
    records = [make_record(depth=depth, pairs=[]) for depth in (2, 4)]
    assert answer.labels(study_of(records)) == "Read '2 x 128' as blocks x width."
    model = {**records[0].config["model"], **heads}
    of_heads = dataclasses.replace(records[0], point="8 x 4", config={**records[0].config, "model": model})
    assert answer.labels(study_of([of_heads])) == "Read '8 x 4' as heads x key/value heads."
    assert answer.labels(study_of([dataclasses.replace(records[0], point="9 x 9")])) == ""


def test_small_models_with_published_names_are_called_twins():
    points = {"MobileLLM-1.5B": 580_000, "MobileLLM-LS-125M": 124_600_000, "run-2M": 1_900_000, "1 x 2": 10}
    records = [
        make_record(
            point=f"{name} (standard)",
            design=name,
            arm="standard",
            pairs=[["MobileLLM-1.5B (standard)", "MobileLLM-LS-125M (standard)"]],
            parameters={"total": size, "embedding": 0, "non_embedding": size},
        )
        for name, size in points.items()
    ]
    named = twins.named(records)
    assert [run.point for run in named] == [
        "twin of MobileLLM-1.5B (standard)",
        *(run.point for run in records[1:]),
    ]
    assert named[0].design == "twin of MobileLLM-1.5B"
    assert named[1].pairs == [["twin of MobileLLM-1.5B (standard)", "MobileLLM-LS-125M (standard)"]]
    assert twins.named(named) == named
    assert records[0].point == "MobileLLM-1.5B (standard)"
