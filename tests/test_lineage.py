"""Runs that start from another run: the same bits, what is kept of the parent, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import assert_trees_close, random_params, tiny_config
from test_results import make_record

from configs import base, finetune
from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.facts import facts_of
from mobilellm_jax.config import flatten, from_config_dict, to_dict
from mobilellm_jax.data import save_tokenizer
from mobilellm_jax.data.tokenizers import BytesTokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs import lineage
from mobilellm_jax.runs.directory import DATA, IMPORTED, TOKENIZER, check_same
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check, run
from mobilellm_jax.storage.checkpoint import MANIFEST, Checkpoints, save_params
from mobilellm_jax.storage.sealed import seal
from mobilellm_jax.training import loop
from mobilellm_jax.training.programs import make_programs
from mobilellm_jax.training.start import Origin, first_state

WORDS = [f"word{i}" for i in range(17)]
FIELDS = {
    "model.vocab_size": 264,
    "data.tokenizer": "bytes",
    "data.valid_fraction": 0.2,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "train.steps": 4,
    "train.eval_rows": 8,
    "train.eval_every": 50,
    "train.checkpoint_every": 50,
    "train.log_every": 1,
    # Parameters are split, the vocabulary too.
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and a finished run of 4 steps, "first"."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [" ".join(WORDS[i * j % 17] for j in range(40)) for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    start(folder, "first")
    return folder


def config_of(folder, parent=None, **changes):
    source = {"data.source": f"files:{folder}/text.jsonl", "data.cache_dir": str(folder / "cache")}
    start_from = {} if parent is None else {"train.init_from": str(folder / parent)}
    return tiny_config(**{**FIELDS, **source, **start_from, **changes})


def start(folder, name, parent=None, say=lambda line: None, **changes):
    def describe(**measured):
        return make_record(**{name: measured[name] for name in ("parent", "floor", "final")})

    return run(config_of(folder, parent, **changes), folder / name, describe, say)


def state_of(folder, name, **changes):
    """Returns the step of the last checkpoint of a run, and its state."""
    config = config_of(folder, "first", **changes)
    programs = make_programs(config, check(config))
    step, state = Checkpoints(folder / name / "checkpoints").restore_latest(programs.state)
    return step, jax.device_get(state)


def manifest(folder, name):
    (step,) = (folder / name / "checkpoints").iterdir()
    return json.loads((step / MANIFEST).read_text())


@pytest.mark.parametrize("kind", ["trained", "imported"])
def test_a_run_starts_with_the_bits_of_its_parent_in_its_own_shardings(folder, tmp_path, kind):
    config = config_of(folder)
    checkpoint = folder / "first" / "checkpoints" / "4"
    _, expected = open_run(folder / "first")
    if kind == "imported":
        checkpoint, expected = tmp_path / "0", random_params(config.model)
        save_params(checkpoint, expected)
    mesh = check(config)
    programs = loop.compile_programs(loop.compile_key(config), mesh)
    state = first_state(programs, config, Origin(checkpoint, config.model, False, 0), mesh)
    assert_trees_close(jax.device_get(state.params), expected, tolerance=0)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, programs.state.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == wanted
    assert len(state.params["embedding"].sharding.shard_shape((264, 24))) == 2
    assert state.params["embedding"].sharding.shard_shape((264, 24)) == (132, 12)
    fresh = programs.init(jax.random.key(0))
    assert_trees_close(jax.device_get(state.opt_state), jax.device_get(fresh.opt_state), tolerance=0)


@pytest.mark.parametrize("vocab_size", [258, 300])
def test_an_embedding_is_resized_by_id(folder, vocab_size):
    smaller = config_of(folder)
    config = config_of(folder, **{"model.vocab_size": vocab_size, "mesh.tensor": 1, "mesh.data": 4})
    mesh = check(config)
    programs = make_programs(config, mesh)
    fresh = jax.device_get(programs.init(jax.random.key(0)).params)
    origin = Origin(folder / "first" / "checkpoints" / "4", smaller.model, False, 0)
    params = jax.device_get(first_state(programs, config, origin, mesh).params)
    _, there = open_run(folder / "first")
    common = min(264, vocab_size)
    expected = np.concatenate([there["embedding"][:common], fresh["embedding"][common:]])
    assert np.array_equal(params["embedding"], expected)
    assert_trees_close(params["blocks"], there["blocks"], tolerance=0)


@pytest.mark.slow
def test_a_constant_rate_goes_on_as_if_it_had_never_stopped(folder):
    start(folder, "straight", **{"train.steps": 7})
    said = []
    record = start(folder, "more", "first", said.append, **{"train.resume_optimizer": True, "train.steps": 3})
    (_, straight), (step, more) = (state_of(folder, name) for name in ("straight", "more"))
    assert (step, int(more.step)) == (3, 3)
    assert_trees_close(more.params, straight.params, tolerance=0)
    assert_trees_close(more.opt_state, straight.opt_state, tolerance=0)
    assert record.parent == {
        "run": "first",
        "step": 4,
        "manifest_sha256": manifest(folder, "first")["sha256"],
        "tokens": 4 * 8 * 9,
        "first_batch": 4,
        "parent": None,
    }
    assert record.floor is None  # n-grams of the first rows are those of the parent's
    # Once more, now with a grandparent, and from other rows: they begin anew.
    again = start(folder, "again", "more", **{"train.resume_optimizer": True, "train.data_seed": 1})
    assert again.parent["first_batch"] == 0
    assert again.parent["parent"] == record.parent
    assert again.parent["tokens"] == 7 * 8 * 9
    on = start(folder, "on", "more", **{"train.resume_optimizer": True})
    assert on.parent["first_batch"] == 7


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_without_its_parent(folder):
    fields = {"train.steps": 3, "train.checkpoint_every": 1, "train.data_seed": 2}
    shutil.copytree(folder / "first", folder / "moved")
    record = start(folder, "whole", "moved", **fields)

    def kill(line):
        if line.startswith("step 2/3"):
            raise Killed

    with pytest.raises(Killed):
        start(folder, "killed", "moved", kill, **fields)
    assert 0 < state_of(folder, "killed")[0] < 3
    (folder / "moved").rename(folder / "gone")
    assert start(folder, "killed", "moved", **fields).parent == record.parent
    for name in ("params", "opt_state"):
        states = [getattr(state_of(folder, run)[1], name) for run in ("killed", "whole")]
        assert_trees_close(*states, tolerance=0)
    # Nor may another run take its place.
    shutil.copytree(folder / "more", folder / "moved")
    (folder / "moved" / "checkpoints" / "3").rename(folder / "moved" / "checkpoints" / "4")
    with pytest.raises(
        UserError, match=r"moved: its step 4 is not the one that the run in .*killed began from"
    ):
        start(folder, "killed", "moved", **fields)
    with pytest.raises(UserError, match=r"train\.init_from is '.*moved' there and '.*first' here"):
        start(folder, "killed", "first", **fields)
    (folder / "killed" / lineage.PARENT).unlink()
    with pytest.raises(UserError, match=r"parent\.json: missing, although the run has checkpoints"):
        start(folder, "killed", "moved", **fields)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr("mobilellm_jax.runs.run.train_together", None)


@pytest.mark.parametrize(
    ("parent", "changes", "message"),
    [
        ("nowhere", {}, r"init_from: .*nowhere: no run found, config\.json is missing"),
        ("new", {}, r"init_from: .*new is --workdir itself"),
        ("../{name}/new", {}, r"init_from: .*new is --workdir itself"),
        (
            "first",
            {"model.depth": 3, "model.ffn_width": 40},
            r"has another model: model\.depth is 2 there and 3 here; model\.ffn_width is 32 there and 40 "
            r"here; use its values, which --config=configs/finetune\.py:.*first does$",
        ),
        ("first", {"model.sharing": "1 0"}, r"the layer plan is 0 1 there and 1 0 here \(model\.sharing"),
        ("first", {"model.parameterization": "mup"}, r"model\.parameterization is 'standard' there"),
        (
            "first",
            {"model.vocab_size": 272},
            r"vocab_size is 264 there and 272 .*train\.resize_embedding=true",
        ),
        (
            "first",
            {"model.vocab_size": 272, "model.width": 32},
            r"vocab_size is 264 there and 272 here; model\.width is 24 there and 32 here; use its values, "
            r"which --config=configs/finetune\.py:.*first does$",
        ),
        ("bpe", {}, r"another tokenizer than data\.tokenizer='bytes' .*:.*bpe/tokenizer/tokenizer\.json, or"),
        ("unknown", {}, r"unknown keeps no tokenizer to compare data\.tokenizer='bytes' with"),
        ("unknown", {"train.resume_optimizer": True}, r"unknown was imported, without an optimizer state"),
        (
            "first",
            {"train.resume_optimizer": True, "optimizer.name": "muon"},
            r"the optimizer of .*first is 'adamw', and optimizer\.name is 'muon' here",
        ),
        ("empty", {}, r"init_from: .*empty: it has no checkpoint yet"),
        ("corrupt", {}, r"init_from: .*corrupt: no checkpoint is intact \(4/_METADATA has changed\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_compiles(folder, no_training, parent, changes, message):
    config = config_of(folder)
    for name in ("unknown", "empty"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "unknown" / IMPORTED).write_text("{}")
    save_params(folder / "unknown" / "checkpoints" / "0", random_params(config.model))
    for name in ("bpe", "corrupt"):
        shutil.copytree(folder / "first", folder / name, dirs_exist_ok=True)
    (folder / "corrupt" / "checkpoints" / "4" / "_METADATA").write_text("")
    save_tokenizer(bpe(), folder / "bpe" / TOKENIZER)
    (folder / "bpe" / DATA).unlink()  # it names the tokenizer of before
    with pytest.raises(UserError, match=message):
        start(folder, "new", parent.format(name=folder.name), **changes)
    shutil.rmtree(folder / "new", ignore_errors=True)


def bpe():
    from mobilellm_jax.data.tokenizers import train_bpe

    return train_bpe("bpe:264", WORDS)


def test_token_ids_are_taken_as_they_are_and_a_resized_embedding_takes_any_tokenizer(folder, tmp_path):
    ids = [{"token_ids": list(range(i, i + 40))} for i in range(60)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ids))
    source = {"data.source": f"tokens:{tmp_path}/ids.jsonl", "data.cache_dir": str(tmp_path)}
    start(folder, "ids", "first", **source)
    shutil.copytree(folder / "first", tmp_path / "bpe")
    save_tokenizer(bpe(), tmp_path / "bpe" / TOKENIZER)
    changes = {"train.init_from": str(tmp_path / "bpe"), "train.resize_embedding": True}
    assert start(folder, "resized", **changes).parent["run"] == "bpe"


def test_old_configs_are_those_of_runs_without_a_parent(folder, tmp_path):
    config = config_of(folder)
    old = to_dict(config)
    for name in ("init_from", "resume_optimizer", "resize_embedding"):
        del old["train"][name]
    assert from_config_dict(old) == config
    assert check_same(tmp_path, old, config) == []
    with pytest.raises(UserError, match=r"train\.init_from is '' there and '.*first' here"):
        check_same(tmp_path, old, config_of(folder, "first"))


def test_runs_from_different_parents_are_not_compared():
    parents = [{"run": "first", "step": 4, "manifest_sha256": sha256} for sha256 in ("a", "b")]
    runs = [make_record(seed=seed, parent=parent) for seed, parent in enumerate(parents)]
    with pytest.raises(UserError, match=r"sha256 of the parent is a in .* but b in"):
        check_comparable(facts_of(runs), runs)
    same = [make_record(seed=seed, parent=parents[0]) for seed in (0, 1)]
    check_comparable(facts_of(same), same)


def test_the_config_that_goes_on_from_a_run_has_its_shape_tokenizer_and_data(folder, tmp_path):
    config = from_config_dict(finetune.get_config(str(folder / "first")))
    there = config_of(folder)
    assert (config.model, config.data, config.optimizer) == (there.model, there.data, there.optimizer)
    assert (config.train.init_from, config.train.batch_size) == (str(folder / "first"), 8)
    defaults = base.get_config()
    assert (config.train.steps, config.mesh.fsdp) == (defaults.train.steps, defaults.mesh.fsdp)
    save_tokenizer(BytesTokenizer(), tmp_path / "run" / TOKENIZER)
    values = to_dict(tiny_config(**{"data.source": "imported"}))
    (tmp_path / "run" / "config.json").write_text(json.dumps(seal(values)))
    config = from_config_dict(finetune.get_config(str(tmp_path / "run")))
    assert (config.data.source, config.data.tokenizer) == (defaults.data.source, "bytes")
    save_tokenizer(bpe(), tmp_path / "run" / TOKENIZER)
    spec = finetune.get_config(str(tmp_path / "run")).data.tokenizer
    assert spec == f"huggingface:{tmp_path}/run/tokenizer/tokenizer.json"
    for preset in ("", str(tmp_path)):
        with pytest.raises(ValueError, match=r"name the run|is not the directory of a run"):
            finetune.get_config(preset)
    assert set(flatten(values)) == set(flatten(to_dict(config)))
