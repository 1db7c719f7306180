"""Records: what is written is read, damage is named, and a failed write loses nothing."""

import copy
import dataclasses
import json
import math
import os
import random
import subprocess
import threading
import time

import pytest
from conftest import flipped

from mobilellm_jax.analysis import records
from mobilellm_jax.analysis.facts import facts_of, pairs_of, points_of
from mobilellm_jax.analysis.records import (
    Record,
    add_entry,
    by_study,
    read_record,
    read_records,
    write_record,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs import provenance
from mobilellm_jax.storage import sealed

SETTINGS = {
    "data": {"source": "bundled", "sequence_length": 256, "cache_dir": "~/.cache"},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50},
    "train": {"steps": 500, "batch_size": 16, "init_seed": 0, "data_seed": 0, "eval_rows": 0},
}


def make_record(
    *,
    depth: int = 4,
    score: float = 3.5,
    seed: int = 0,
    learning_rate: float = 2e-3,
    metric: str = "loss",
    **changes,
) -> Record:
    """Returns a plausible finished run with 2,048,000 tokens; `score` is its final held-out loss or error."""
    width = 128
    loss = score if metric == "loss" else 0.5 + score
    evaluations = [
        {
            "step": step,
            "loss": loss + 0.8 * ((500 / step) ** 0.7 - 1),
            "bits_per_byte": 0.51 * loss if metric == "loss" else None,
            "error": score + (1 - score) * (1 - step / 500) if metric == "error" else None,
            **({} if metric in ("loss", "error") else {metric: score + 1 - step / 500}),
        }
        for step in range(50, 501, 50)
    ]
    model = {
        "depth": depth,
        "width": width,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_width": 256,
        "head_dim": 32,
    }
    settings = copy.deepcopy(SETTINGS)
    settings["optimizer"]["learning_rate"] = learning_rate
    settings["train"] |= {"init_seed": seed, "data_seed": seed}
    fields = {
        "study": "shape",
        "preset": "tiny",
        "point": f"{depth} x {width}",
        "point_index": depth,
        "seed": seed,
        "phase": "comparison",
        "question": "Does depth or width help more?",
        "matched": "non_embedding_parameters",
        "scientific": ["model.depth", "model.width"],
        "nuisance": ["optimizer.learning_rate"],
        "tuning": "grid",
        "metric": metric,
        "pairs": [["4 x 128", "2 x 128"]],
        "margin": 0.02,
        "x": {"label": "depth (layers)", "value": depth, "log": True},
        "status": "finished",
        "error": None,
        "overrides": {"model.depth": depth, "model.width": width},
        "config": {"model": model, **settings},
        "layer_plan": list(range(depth)),
        "parameters": {"total": 1_000_000 + depth, "embedding": 250_000, "non_embedding": 750_000 + depth},
        "budgets": {
            "total_parameters": 1_000_000 + depth,
            "embedding_parameters": 250_000,
            "non_embedding_parameters": 750_000 + depth,
            "train_flops_per_token": 6.3e6,
            "inference_flops_per_token": 2.1e6,
            "kv_cache_bytes_per_token": 512 * depth,
            "decode_bytes_per_token": 4_000_000 + 4 * depth,
            "optimizer_bytes": 16_000_000 + 16 * depth,
            "activation_bytes": 8_000_000 + 100_000 * depth,
        },
        "data": {"source_sha256": "ab" * 32, "tokenizer_sha256": "cd" * 32, "vocab_size": 2048},
        "steps": 500,
        "tokens_seen": 500 * 16 * 256,
        "final": evaluations[-1],
        "best": evaluations[-1],
        "evaluations": evaluations,
        "train_curve": [[1, 7.6], [500, loss]],
        "timing": {"wall_s": 30.0, "compile_s": 5.0, "train_s": 24.0, "tokens_per_second": 85333.3},
        "git_commit": "0123abc",
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "command": "python -m experiments.sweep --config=configs/shape.py:tiny",
        "created": "2026-01-01T00:00:00+00:00",
    }
    if metric == "loss":  # past the trigram, and context pays
        ends = [2**i for i in range(9)]
        fields["floor"] = {"tokens": 2_048_000, "unigram": 6.1, "bigram": 5.2, "trigram": 4.9}
        fields["by_position"] = {
            "to": ends,
            "loss": [loss + 1 / end for end in ends],
            "targets": [100 * end for end in (1, 1, *ends[1:-1])],
        }
    return Record(**{**fields, **changes})


def make_tuning(*, depth: int = 4, best: float = 2e-3, score: float = 3.5, **changes) -> list[Record]:
    """Returns the learning-rate search of a point: `score` at `best`, a parabola in log2 beside it.

    The rate four times the best diverged; `changes` are as in `make_record`.
    """
    runs = [
        make_record(
            depth=depth,
            score=score + 0.03 * octaves**2,
            learning_rate=best * 2**octaves,
            **{"phase": "tuning", **changes},
        )
        for octaves in (-2, -1, 0, 1)
    ]
    return [*runs, make_diverged(depth=depth, learning_rate=best * 4, **{"phase": "tuning", **changes})]


def make_diverged(**changes) -> Record:
    """Returns a run whose loss was not finite from step 300 on."""
    evaluations = [
        {"step": s, "loss": 4.0 if s < 300 else math.nan, "bits_per_byte": None, "error": None}
        for s in (100, 300)
    ]
    gone = {"status": "diverged", "error": "loss is nan at step 300", "final": evaluations[0], "steps": 300}
    return make_record(**{**gone, "evaluations": evaluations, "tokens_seen": 300 * 16 * 256, **changes})


def test_what_is_written_is_read(tmp_path):
    record = make_record()
    write_record(record, tmp_path / "new" / "directory" / "a.json")
    assert read_record(tmp_path / "new" / "directory" / "a.json") == record


def test_accuracies_are_added_to_a_record(tmp_path):
    path, record = tmp_path / "a.json", make_record()
    write_record(record, path)
    assert "zero_shot" not in json.loads(path.read_text())  # older code can read it
    entries = {
        task: {"items": 5, "metrics": {"acc": {"value": 0.4, "standard_error": 0.1}}}
        for task in ("piqa", "boolq")
    }
    for task, entry in entries.items():
        add_entry(path, "zero_shot", task, entry)
    assert read_record(path) == dataclasses.replace(record, zero_shot=entries)
    path.write_text(path.read_text().replace("0.4", "0.5", 1))
    with pytest.raises(UserError, match="changed since it was written"):
        add_entry(path, "zero_shot", "piqa", entries["piqa"])
    fields = json.loads(path.read_text())
    del fields[sealed.SEAL]
    path.write_text(json.dumps({**fields, "zero_shot": {"piqa": 0.4}}))
    with pytest.raises(UserError, match=r"zero_shot\.piqa: 0\.4 is of type float"):
        read_record(path)


def test_entries_that_are_added_at_once_are_all_kept(tmp_path, monkeypatch):
    path, read = tmp_path / "a-s0.json", records.read_record
    write_record(make_record(), path)

    def read_slowly(path):
        record = read(path)
        time.sleep(0.1)
        return record

    monkeypatch.setattr(records, "read_record", read_slowly)
    entries = {f"w{bits}:32": {"gap": 0.1} for bits in range(2, 6)}
    adding = [
        threading.Thread(target=records.add_entry, args=(path, "quantized", name, entry))
        for name, entry in entries.items()
    ]
    for thread in adding:
        thread.start()
    for thread in adding:
        thread.join()
    assert read(path).quantized == entries
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_record(make_diverged(train_curve=[[1, 7.6], [300, math.inf]]), tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    record = read_record(tmp_path / "a.json")
    assert record.evaluations[-1] == {"step": 300, "loss": None, "bits_per_byte": None, "error": None}
    assert record.train_curve[-1] == [300, None]
    with pytest.raises(ValueError, match="did not finish"):
        _ = record.score


def test_file_is_sorted_and_holds_one_pair_per_line(tmp_path):
    write_record(make_record(point="[1,   2]"), tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text().splitlines()
    names = [line.split('"')[1] for line in lines if line.startswith('  "')]
    assert names == sorted(names)
    assert "    [ 1, 7.6 ]," in lines
    assert read_record(tmp_path / "a.json").point == "[1,   2]"


def change(**fields):
    def damage(record):
        for name, value in fields.items():
            *groups, last = name.split("__")
            target = record
            for group in groups:
                target = target[group]
            target[last] = value

    return damage


def remove(name):
    def damage(record):
        *groups, last = name.split(".")
        for group in groups:
            record = record[group]
        del record[last]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(schema=99), "schema: version 99 is unknown"),
        (remove("schema"), "schema: the field is missing"),
        (remove("seed"), "seed: the field is missing"),
        (change(sead=1), "sead: no such field; did you mean seed"),
        (change(seed="0"), "seed: '0' is of type str; expected int"),
        (change(seed=True), "seed: True is of type bool; expected int"),
        (change(git_commit=3), r"git_commit: 3 is of type int; expected str \| None"),
        (change(phase="final"), "phase: 'final' is of type str; expected Literal"),
        (change(tuning="random"), "tuning: 'random' is of type str; expected Literal"),
        (change(metric="error"), "final.error: missing from a finished run"),
        (change(pairs=[["a"]]), r"pairs: expected pairs \[point, other\]"),
        (change(margin=1), "margin: 1 is of type int; expected float"),
        (change(budgets__optimizer_bytes="1"), r"budgets.optimizer_bytes: '1' is of type str"),
        (change(scientific=["a", 1]), r"scientific\[1\]: 1 is of type int; expected str"),
        (change(layer_plan={}), "layer_plan: {} is of type dict"),
        (change(status="done"), "status: 'done' is of type str; expected Literal"),
        (change(status="failed"), "error: missing from a failed run"),
        (change(overrides={"model.depth": [1]}), r"overrides.model.depth: \[1\] is of type list"),
        (change(final=None), "final.loss: missing from a finished run"),
        (change(final__loss=None), "final.loss: missing from a finished run"),
        (change(final__loss=math.nan), "final.loss: nan is not a finite number"),
        (
            change(evaluations=[{"step": 1, "loss": 3.0}]),
            r"evaluations\[0\].bits_per_byte: the field is missing",
        ),
        (change(train_curve=[[1]]), "train_curve: expected pairs"),
        (change(data__rows=[1.0, math.inf]), r"data.rows\[1\]: inf is not a finite number"),
        (remove("data.tokenizer_sha256"), "data.tokenizer_sha256: missing"),
        (remove("parameters.non_embedding"), "parameters.non_embedding: the field is missing"),
        (change(parameters__total=1.5), "parameters.total: 1.5 is of type float; expected int"),
        (remove("config.model"), "config.model.depth: the field is missing"),
        (remove("config.train.batch_size"), "config.train.batch_size: the field is missing"),
        (change(x__value=0), "x.value: not positive, on a logarithmic axis"),
        (change(x__value="4"), "x.value: not a number"),
        (remove("x.log"), "x.log: the field is missing"),
    ],
)
def test_damaged_field_is_named(tmp_path, damage, message):
    fields = dataclasses.asdict(make_record())
    damage(fields)
    (tmp_path / "a.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"a\.json: {message}"):
        read_record(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema": 1', b"\xff\xfe"])
def test_file_that_holds_no_record_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: "):
        read_records(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.json: not a readable JSON record"):
        read_record(tmp_path / "a.json")


def test_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_record(make_record(seed=1), path)
    with pytest.raises(UserError, match=r"x\.value"):
        write_record(make_record(x={"label": "depth", "value": -1, "log": True}), path)

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match=r"a\.json: cannot be written: .*No space left"):
        write_record(make_record(seed=2), path)
    assert read_record(path).seed == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_file_is_replaced_and_never_overwritten(tmp_path):
    write_record(make_record(seed=1), tmp_path / "a.json")
    os.link(tmp_path / "a.json", tmp_path / "old.json")  # what a reader who opened it before goes on reading
    write_record(make_record(seed=2), tmp_path / "a.json")
    assert [read_record(tmp_path / name).seed for name in ("a.json", "old.json")] == [2, 1]


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_record(make_record(), tmp_path / "file" / "a.json")


def test_read_all_sorts_by_study_preset_point_and_seed(tmp_path):
    order = [
        ("a", "tiny", 1, 1),
        ("a", "tiny", 2, 0),
        ("a", "tiny", 10, 0),
        ("b", "small", 1, 0),
        ("b", "tiny", 1, 0),
    ]
    for name, (study, preset, index, seed) in zip("zyxwv", order, strict=True):
        record = make_record(study=study, preset=preset, point_index=index, seed=seed)
        write_record(record, tmp_path / study / f"{name}.json")
    (tmp_path / "notes.txt").write_text("not a record")
    read = read_records(tmp_path)
    assert [(r.study, r.preset, r.point_index, r.seed) for r in read] == order
    assert read_records(tmp_path / "nothing") == []
    assert list(by_study(read)) == [("a", "tiny"), ("b", "small"), ("b", "tiny")]


def test_only_a_finished_run_has_a_score_that_of_the_metric():
    record = make_record(metric="error", score=0.25)
    assert (record.score, record.loss) == (0.25, record.final["loss"]) == (0.25, 0.75)
    for gone in (make_diverged(), make_record(final=None)):
        for name in ("score", "loss"):
            with pytest.raises(ValueError, match="did not finish"):
                getattr(gone, name)


def test_the_newest_record_speaks_for_the_study():
    times = ["2026-01-01T00:00:00+00:00", "2026-01-03T00:00:00+00:00", "2026-01-02T00:00:00+00:00"]
    records = [make_record(created=time, question=time) for time in times]
    assert facts_of(records).question == facts_of(reversed(records)).question == times[1]
    same = [make_record(seed=s, point_index=i, question=f"{s}") for s, i in ((0, 1), (1, 1), (2, 0))]
    assert facts_of(same).question == facts_of(reversed(same)).question == "1"


def test_points_stay_in_study_order():
    records = [make_record(depth=d, seed=s) for s in (1, 0) for d in (16, 2)]
    points = points_of(records)
    assert [(label, [run.seed for run in point.runs]) for label, point in points.items()] == [
        ("2 x 128", [0, 1]),
        ("16 x 128", [0, 1]),
    ]


def test_git_commit_knows_changed_code_from_new_results(tmp_path, monkeypatch):
    def git(*args):
        settings = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *settings, *args], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "results.py"))
    assert provenance.git_commit() is None  # no repository
    git("init")
    (package / "results.py").write_text("a = 1\n")
    (tmp_path / "other.txt").write_text("other")
    git("add", "other.txt")
    git("commit", "-m", "first")
    assert provenance.git_commit() is None  # a repository that does not track the package
    git("add", ".")
    git("commit", "-m", "second")
    clean = provenance.git_commit()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "result.json").write_text("{}")
    assert provenance.git_commit() == clean
    (tmp_path / "new.py").touch()
    assert provenance.git_commit() == clean + "-dirty"


def test_versions_name_the_libraries():
    versions = provenance.versions()
    assert set(versions) == {"python", "jax", "jaxlib", "flax", "optax", "numpy"}
    assert versions["numpy"][0].isdigit()


def test_a_bit_flipped_in_a_record_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    write_record(make_record(), path)
    content, rng = path.read_bytes(), random.Random(0)
    for bit in rng.sample(range(8 * len(content)), 300):
        path.write_bytes(flipped(content, bit))
        with pytest.raises(UserError, match=rf"^{path}: "):
            read_record(path)


def test_a_record_from_before_the_seal_is_read(tmp_path):
    path = tmp_path / "a.json"
    write_record(make_record(), path)
    path.write_text(json.dumps(sealed.unseal(json.loads(path.read_text()))))
    assert read_record(path) == make_record()


@pytest.mark.parametrize(
    "asked",
    [
        [("b", "a"), ("c", "a"), ("d", "a")],  # with a baseline
        [("b", "a"), ("c", "a"), ("d", "a"), ("c", "b"), ("d", "b"), ("d", "c")],  # all
        [("b", "a"), ("c", "b"), ("d", "c")],  # steps
        [("d", "a"), ("b", "a"), ("c", "b")],  # in an order of its own
    ],
)
def test_pairs_of_a_study_come_together_in_its_order(asked):
    def of(label):
        return [list(pair) for pair in asked if label in pair]

    runs = [make_record(point=p, point_index=i, pairs=of(p)) for i, p in enumerate("abcd")]
    assert pairs_of(runs) == pairs_of(runs[::-1]) == asked
    assert pairs_of(runs[:2] + runs[3:]) == asked  # those of "c" are known from the others
    older = [dataclasses.replace(run, pairs=[list(pair) for pair in asked]) for run in runs]
    assert pairs_of(older) == pairs_of([*runs[:2], *older[2:]]) == asked
    odd = dataclasses.replace(runs[0], seed=1, pairs=[list(pair) for pair in asked[::-1]])
    assert sorted(pairs_of([*runs, odd])) == sorted(asked)
