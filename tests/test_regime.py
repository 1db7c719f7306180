"""The regime of a study: n-gram floors, loss by position, and what a report says of them first."""

import dataclasses

import pytest
from test_results import make_record, make_tuning

from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.facts import facts_of
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.errors import UserError

ENDS = [1, 2, 4, 8, 16, 64]
TARGETS = [10, 10, 20, 40, 80, 480]


def places(near, far, last=None):
    losses = [near + 2, near + 1, near + 0.5, near, far, far if last is None else last]
    return {"to": ENDS, "loss": losses, "targets": TARGETS}


def floor(trigram):
    return {"tokens": 179_200, "unigram": 5.5, "bigram": 3.7, "trigram": trigram}


def two_points(shallow, deep, seeds=3):
    """Comparison runs of 2 and 4 blocks; `shallow` and `deep` map a seed to changes of the record."""
    return [
        make_record(depth=depth, seed=seed, **changes(seed))
        for depth, changes in ((2, shallow), (4, deep))
        for seed in range(seeds)
    ]


def test_first_line_says_which_designs_are_above_the_trigram_or_flat():
    records = two_points(
        lambda seed: {
            "score": 3.70 + 0.01 * seed,
            "floor": floor(3.15 + 0.003 * seed),
            "by_position": places(3.698, 3.690),
        },
        lambda seed: {
            "score": 3.10 + 0.01 * seed,
            "floor": floor(3.15 + 0.003 * seed),
            "by_position": places(3.2, 3.1),
        },
    )
    found = study_of(records).verdict
    assert found.warnings[0] == (
        "Architecture cannot be judged here: a trigram counted on the same training tokens (3.153 nats) is "
        "better than '2 x 128' (3.710); context beyond 8 tokens is worth less than 0.01 nats per token to "
        "'2 x 128'."
    )
    both = study_of(
        [dataclasses.replace(run, final={**run.final, "loss": 4.0 + run.seed}) for run in records]
    )
    assert "(3.153 nats) is better than all 2 designs (5.000); context" in both.verdict.warnings[0]
    assert found.regimes["4 x 128"].floor["trigram"] == pytest.approx(3.153)
    assert found.regimes["4 x 128"].by_position[8] == pytest.approx(3.2)


def test_many_designs_are_counted_and_not_named():
    position = {True: places(3.698, 3.690), False: places(3.2, 3.1)}  # flat or not
    runs = [
        make_record(depth=depth, seed=seed, by_position=position[depth > 1], floor=floor(1.0))
        for depth in range(1, 9)
        for seed in range(2)
    ]
    (warning, *_) = study_of(runs).verdict.warnings
    assert warning.endswith(
        "better than all 8 designs (3.500); context beyond 8 tokens is worth less than 0.01 "
        "nats per token to 7 of 8 designs."
    )
    (few, *_) = study_of(runs[:14]).verdict.warnings
    assert few.endswith("'2 x 128', '3 x 128', '4 x 128', '5 x 128', '6 x 128', '7 x 128'.")


def test_far_loss_weighs_bins_by_their_targets():
    # plain mean of the far bins: 3.195, flat; by targets (80 * 3.0 + 480 * 3.39) / 560 = 3.334
    positions = places(3.36, 3.0, 3.39)
    (found,) = study_of([make_record(by_position=positions)]).verdict.regimes.values()
    assert found.far == pytest.approx((80 * 3.0 + 480 * 3.39) / 560)
    assert not found.is_flat
    (flat,) = study_of([make_record(by_position=places(3.36, 3.351))]).verdict.regimes.values()
    assert flat.is_flat
    short = {"to": [1, 2, 4, 6], "loss": [4.0, 3.9, 3.8, None], "targets": [1, 1, 2, 0]}
    (unknown,) = study_of([make_record(by_position=short)]).verdict.regimes.values()
    assert (unknown.near, unknown.far, unknown.is_flat) == (3.8, None, False)


def test_nothing_is_said_where_architecture_can_show():
    assert not [w for w in study_of([make_record()]).verdict.warnings if "rchitecture" in w]


def test_without_counts_it_is_not_known():
    old = {"floor": None, "by_position": None}
    unknown = ": whether architecture can show here is not known."
    none = study_of(two_points(lambda _: old, lambda _: old)).verdict
    assert none.warnings[0] == f"The n-gram floor was not counted{unknown}"
    assert none.regimes["2 x 128"].floor == {}
    some = study_of(two_points(lambda _: old, lambda _: {})).verdict
    assert some.warnings[0] == f"The n-gram floor was not counted for '2 x 128'{unknown}"


def test_synthetic_tasks_and_tuning_alone_have_no_regime():
    task = study_of([make_record(metric="error", score=0.2, seed=seed) for seed in range(3)]).verdict
    tuning = study_of(make_tuning()).verdict
    for found in (task, tuning):
        assert found.regimes == {}
        assert not [w for w in found.warnings if "rchitecture" in w]


def test_two_compute_dtypes_are_said():
    def with_dtypes(*dtypes):
        config = make_record().config
        configs = [config | {"model": config["model"] | {"compute_dtype": dtype}} for dtype in dtypes]
        runs = [make_record(config=c, seed=seed) for seed, c in enumerate(configs)]
        return [w for w in check_comparable(facts_of(runs), runs) if "dtype" in w]

    assert with_dtypes("float32", "float32") == []
    assert with_dtypes("float32", "bfloat16", "float32") == [
        "The runs differ in model.compute_dtype: float32 (2 runs), bfloat16 (1 runs)."
    ]


def test_text_seen_more_than_once_is_said():
    def warned(tokens):
        card = make_record().data | {"splits": {"train": {"tokens": tokens}, "valid": {"documents": 3}}}
        runs = [make_record(data=card, seed=seed) for seed in range(3)]
        return [w for w in check_comparable(facts_of(runs), runs) if "was seen" in w]

    assert warned(1_170_286) == ["The training text was seen 1.75 times: it is not all new."]
    assert warned(2_048_000) == []


PLAN = {"seeds": 3, "pairs": 1, "sd": 0.02, "power": 0.8, "control": False}


@pytest.mark.parametrize(
    ("changes", "what"), [({"plan": PLAN}, "a plan"), ({"tuning": "fitted"}, "a fitted learning rate")]
)
def test_records_of_two_protocols_are_refused(changes, what):
    old = [make_record(depth=2, seed=seed) for seed in range(3)]
    new = [make_record(depth=4, seed=seed, **changes) for seed in range(3)]
    message = (
        f"shape:tiny: records of two protocols: 3, such as '4 x 128' seed 0, have {what}, and 3, such as "
        "'2 x 128' seed 0, do not; one verdict cannot be made of both"
    )
    with pytest.raises(UserError, match=message):
        study_of([*old, *new])
    study_of([dataclasses.replace(run, **changes) for run in old] + new)  # all new: fine
    study_of(old)
