"""Runs that have a teacher: the same bits after a kill, what is kept of the teacher, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import assert_trees_close, loss_and_gradients, random_params, tiny_config
from test_results import make_record

from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.facts import facts_of
from mobilellm_jax.config import to_dict
from mobilellm_jax.data import save_tokenizer
from mobilellm_jax.data.rows import inputs_and_targets
from mobilellm_jax.data.tokenizers import BytesTokenizer, train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import adapted, merged
from mobilellm_jax.runs.directory import DATA, IMPORTED, TOKENIZER, check_same
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check, run
from mobilellm_jax.runs.teacher import TEACHER, open_teacher
from mobilellm_jax.storage.checkpoint import MANIFEST, save_params
from mobilellm_jax.storage.sealed import seal, unseal
from mobilellm_jax.training import loop
from mobilellm_jax.training.programs import compile_key, make_programs
from mobilellm_jax.training.teacher import place_teacher

WORDS = [f"word{i}" for i in range(17)]
FIELDS = {
    "model.vocab_size": 264,
    "data.tokenizer": "bytes",
    "data.valid_fraction": 0.2,
    "train.steps": 3,
    "train.eval_rows": 8,
    "train.eval_every": 50,
    "train.checkpoint_every": 1,
    "train.log_every": 1,
}
# Another shape than that of the run.
SHAPE = {"model.depth": 3, "model.width": 32, "model.num_heads": 2, "model.ffn_width": 40}


def config_of(folder, teacher=None, **changes):
    source = {"data.source": f"files:{folder}/text.jsonl", "data.cache_dir": str(folder / "cache")}
    taught = {} if teacher is None else {"train.teacher": str(folder / teacher)}
    return tiny_config(**{**FIELDS, **source, **taught, **changes})


def keep(directory, config, step, params, tokenizer=None):
    """Writes a run that was imported."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(seal(to_dict(config))))
    (directory / IMPORTED).write_text("{}")
    save_params(directory / "checkpoints" / str(step), params)
    save_tokenizer(tokenizer or BytesTokenizer(), directory / TOKENIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, a teacher of another shape, and a run without one, "plain"."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [" ".join(WORDS[i * j % 17] for j in range(40)) for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    teacher = config_of(folder, **SHAPE)
    keep(folder / "teacher", teacher, 7, random_params(teacher.model))
    start(folder, "plain")
    return folder


def start(folder, name, teacher=None, say=lambda line: None, **changes):
    def describe(**measured):
        return make_record(**{name: measured[name] for name in ("teacher", "final", "train_curve")})

    return run(config_of(folder, teacher, **changes), folder / name, describe, say)


def lines(folder, name):
    log = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, log) if line["kind"] == "train"]


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_bit_for_bit_with_the_same_teacher(folder):
    shutil.copytree(folder / "teacher", folder / "moved")
    record = start(folder, "whole", "moved")

    def kill(line):
        if line.startswith("step 2/3"):
            raise Killed

    with pytest.raises(Killed):
        start(folder, "killed", "moved", kill)
    # A newer checkpoint of the teacher is not taken.
    keep(folder / "moved", config_of(folder, **SHAPE), 9, random_params(config_of(folder, **SHAPE).model))
    said = []
    assert start(folder, "killed", "moved", said.append).teacher == record.teacher
    assert any(line.startswith("resuming after step") for line in said)
    (_, whole), (_, killed) = (open_run(folder / name) for name in ("whole", "killed"))
    assert_trees_close(killed, whole, tolerance=0)
    assert record.teacher == {
        "run": "moved",
        "step": 7,
        "manifest_sha256": json.loads((folder / "moved/checkpoints/7" / MANIFEST).read_text())["sha256"],
        "flops_per_token": pytest.approx(record.teacher["flops_per_token"]),
    }
    # It is no part of the checkpoints: a run without a teacher has the same arrays.
    _, plain = open_run(folder / "plain")
    assert jax.tree.map(np.shape, whole) == jax.tree.map(np.shape, plain)
    config = config_of(folder, "moved")
    lineage = json.loads((folder / "killed" / TEACHER).read_text())
    for file, message in (
        (folder / "moved/checkpoints/7/params.safetensors", r"step 7, but 7/params\.safetensors has changed"),
        (folder / "moved/checkpoints/7" / MANIFEST, r"step 7, but 7/manifest\.sha256\.json is missing"),
    ):
        content = file.read_bytes()
        file.unlink()
        if file.name != MANIFEST:
            file.write_bytes(content[:-1])
        with pytest.raises(UserError, match=message):
            open_teacher(config, folder / "killed", check(config))
        file.write_bytes(content)
    other = {**unseal(lineage), "manifest_sha256": "0" * 64}
    (folder / "killed" / TEACHER).write_text(json.dumps(seal(other)))
    with pytest.raises(UserError, match=r"it is another one \(sha256 000000000000 there"):
        open_teacher(config, folder / "killed", check(config))
    (folder / "killed" / TEACHER).unlink()
    with pytest.raises(UserError, match=r"teacher\.json: missing, although the run has checkpoints"):
        open_teacher(config, folder / "killed", check(config))


def test_both_losses_are_logged_and_the_held_out_loss_is_that_of_the_tokens(folder):
    said = []
    record = start(folder, "logged", "teacher", said.append)
    first, plain = (lines(folder, name)[0] for name in ("logged", "plain"))
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-6)  # before the first step
    assert first["teacher_loss"] != first["loss"]
    assert set(first) - set(plain) == {"teacher_loss"}
    assert any(f"teacher's {first['teacher_loss']:.4f}" in line for line in said)
    assert [loss for _, loss in record.train_curve] == [line["loss"] for line in lines(folder, "logged")]
    config, params = open_run(folder / "logged")
    (rows,) = loop.data.prepare(config.data, 264).eval_batches(batch_size=8, rows=8, split="valid")
    (nats, count), _ = loss_and_gradients(params, *map(np.asarray, inputs_and_targets(rows)), config.model)
    assert record.final["loss"] == pytest.approx(float(nats / count), rel=1e-5)


def test_weight_0_is_training_without_a_teacher(folder):
    """Bit for bit; the teacher is not even opened."""
    record = start(folder, "weight 0", "nowhere", **{"train.teacher_weight": 0.0})
    assert record.teacher is None
    (_, plain), (_, found) = (open_run(folder / name) for name in ("plain", "weight 0"))
    assert_trees_close(found, plain, tolerance=0)
    assert [line["loss"] for line in lines(folder, "weight 0")] == [
        line["loss"] for line in lines(folder, "plain")
    ]


def test_adapters_of_a_teacher_are_merged_and_all_parameters_are_split_over_the_mesh(folder, tmp_path):
    lora = {"train.lora_rank": 2, "train.init_from": str(folder / "teacher")}
    theirs = config_of(folder, **SHAPE, **lora)
    stored = adapted(theirs)
    params = random_params(stored)
    keep(tmp_path / "adapted", theirs, 1, params)
    config = config_of(tmp_path, "adapted", **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    mesh = check(config)
    teacher = open_teacher(config, tmp_path / "run", mesh)
    programs = make_programs(config, mesh, teacher.distillation)
    (placed,) = place_teacher(programs, teacher.for_training, mesh)
    assert_trees_close(jax.device_get(placed), jax.device_get(merged(params, stored)), 1e-6)
    assert placed["embedding"].sharding.shard_shape((264, 32)) == (132, 16)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, programs.teacher[0])
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == wanted


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr("mobilellm_jax.runs.run.train_together", None)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ("nowhere", {}, r"teacher: .*nowhere: no run found, config\.json is missing"),
        ("new", {}, r"teacher: .*new is --workdir itself; a teacher is another run"),
        ("teacher", {"model.vocab_size": 272}, r"another vocabulary: model\.vocab_size is 264 there and 272"),
        ("bpe", {}, r"another tokenizer than data\.tokenizer='bytes' .*:.*bpe/tokenizer/tokenizer\.json$"),
        ("corrupt", {}, r"teacher: .*corrupt: no checkpoint is intact \(7/params\.safetensors has changed"),
        ("teacher", {"mesh.tensor": 4, "mesh.data": 2}, r"its model\.num_heads: 2 is not divisible by"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_compiles(folder, no_training, teacher, changes, message):
    for name in ("bpe", "corrupt"):
        shutil.copytree(folder / "teacher", folder / name, dirs_exist_ok=True)
    (folder / "corrupt/checkpoints/7/params.safetensors").write_bytes(b"")
    save_tokenizer(train_bpe("bpe:264", WORDS), folder / "bpe" / TOKENIZER)
    (folder / "bpe" / DATA).unlink(missing_ok=True)  # it names the tokenizer of before
    heads = {"model.num_kv_heads": 4} if "mesh.tensor" in changes else {}
    with pytest.raises(UserError, match=message):
        start(folder, "new", teacher, **heads, **changes)
    assert not (folder / "new" / TEACHER).exists()
    shutil.rmtree(folder / "new", ignore_errors=True)


def test_old_configs_are_those_of_runs_without_a_teacher(folder, tmp_path):
    config = config_of(folder)
    old = to_dict(config)
    for name in ("teacher", "teacher_weight", "teacher_temperature"):
        del old["train"][name]
    assert check_same(tmp_path, old, config) == []
    with pytest.raises(UserError, match=r"train\.teacher is '' there and '.*teacher' here"):
        check_same(tmp_path, old, config_of(folder, "teacher"))
    assert compile_key(config) == compile_key(config_of(folder, "teacher"))


def test_runs_of_different_teachers_are_not_compared():
    teachers = [
        {"run": "large", "step": 4, "manifest_sha256": sha256, "flops_per_token": 1.0}
        for sha256 in ("a", "b")
    ]
    runs = [make_record(seed=seed, teacher=teacher) for seed, teacher in enumerate(teachers)]
    with pytest.raises(UserError, match=r"sha256 of the teacher is a in .* but b in"):
        check_comparable(facts_of(runs), runs)
    same = [make_record(seed=seed, teacher=teachers[0]) for seed in (0, 1)]
    check_comparable(facts_of(same), same)
