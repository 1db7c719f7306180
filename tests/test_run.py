"""A run's directory belongs to one config, from the first checkpoint on; records say where they were made."""

import json
import os
import platform
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import BATCH, LENGTH, assert_trees_close, random_params, tiny_config
from test_results import make_record

from mobilellm_jax import data
from mobilellm_jax.config import flatten, from_config_dict, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.data import save_tokenizer
from mobilellm_jax.data.ngrams import ngram_losses
from mobilellm_jax.data.tokenizers import HuggingFaceTokenizer, train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs import provenance
from mobilellm_jax.runs.directory import (
    DATA,
    IMPORTED,
    TOKENIZER,
    begins_with_bos,
    check_same,
    claim_data,
    claim_workdir,
    open_tokenizer,
    read_config,
    repeats_note,
)
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import (
    _floor_fields,
    enable_compilation_cache,
    failed_fields,
    measured_fields,
    planned_fields,
    run,
    thin,
)
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.storage.sealed import seal
from mobilellm_jax.training import loop
from mobilellm_jax.training.loop import Outcome


def test_a_config_that_never_trained_can_be_mended(tmp_path):
    claim_workdir(tmp_path, tiny_config(**{"data.source": "files:typo.txt"}))
    config = tiny_config(**{"data.source": "files:text.txt"})
    claim_workdir(tmp_path, config)
    assert from_config_dict(read_config(tmp_path / "config.json")) == config


def test_a_config_with_a_checkpoint_stands(tmp_path):
    claim_workdir(tmp_path, tiny_config())
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    free = {"mesh.fsdp": 2, "train.log_every": 3, "train.eval_every": 3, "model.remat": "full"}
    changes = [
        "model.remat 'none' -> 'full'",
        "train.eval_every 100 -> 3",
        "train.log_every 20 -> 3",
        "mesh.fsdp 1 -> 2",
    ]
    assert claim_workdir(tmp_path, tiny_config(**free)) == changes
    assert claim_workdir(tmp_path, tiny_config(**free)) == []
    with pytest.raises(UserError, match=r"model\.width is 24 there and 32 here.*another --workdir"):
        claim_workdir(tmp_path, tiny_config(**{"model.width": 32}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not the config of a run"):
        claim_workdir(tmp_path, tiny_config())
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing, although there are checkpoints"):
        claim_workdir(tmp_path, tiny_config())


def test_only_what_does_not_change_the_result_may_differ_on_resume():
    config = tiny_config()
    there = {group: dict.fromkeys(fields, "another") for group, fields in to_dict(config).items()}
    with pytest.raises(UserError) as error:
        check_same(Path("config.json"), there, config)
    refused = re.findall(r"(\S+) is 'another' there", str(error.value))
    free = set(flatten(there)) - set(refused)
    cadence = {"train.log_every", "train.eval_every", "train.checkpoint_every", "train.writers"}
    watched = cadence | {"data.cache_dir"}
    computed = {"model.attention", "model.remat", "model.scan_unroll", "model.loss_chunk"}
    assert free == watched | computed | {"mesh.data", "mesh.fsdp", "mesh.tensor"}


def test_what_is_planned_comes_from_the_config():
    config = tiny_config(
        **{"model.sharing": "reverse", "model.num_repeats": 2, "train.accumulation_steps": 2}
    )
    fields = planned_fields(config)
    counts = accounting.parameters(config.model)
    assert fields["config"] == to_dict(config)
    assert fields["layer_plan"] == [0, 1, 1, 0]
    assert fields["parameters"].items() >= {"total": counts.total, "embedding": counts.embedding}.items()
    assert fields["parameters"]["non_embedding"] == counts.non_embedding == counts.total - counts.embedding
    assert fields["budgets"] == accounting.budgets(config.model, LENGTH, BATCH // 2)
    assert fields["budgets"] != accounting.budgets(config.model, LENGTH, BATCH)
    failed = failed_fields(config, "why")
    assert (failed["status"], failed["error"], failed["steps"], failed["final"]) == ("failed", "why", 0, None)


CARD = {
    "source": "bundled",
    "source_sha256": "a1" * 32,
    "valid_source_sha256": None,
    "python_version": "3.11.7",
    "tokenizer_sha256": "cd" * 32,
    "splits": {"train": {"sha256": "01" * 32}, "valid": {"sha256": "02" * 32, "documents": 4}},
}


def test_data_stand_from_the_first_checkpoint_on(tmp_path):
    other = {**CARD, "source_sha256": "b2" * 32, "python_version": "3.13.0"}
    assert claim_data(tmp_path, CARD) is None
    assert claim_data(tmp_path, other) is None
    assert claim_data(tmp_path, CARD) is None
    for step in (4, 8):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    for same in (CARD, {**CARD, "python_version": "3.12.1", "split": "a new field"}):
        assert claim_data(tmp_path, same) is None
    splits, texts = CARD["splits"], "bundled of Python 3.12.1 -> bundled of Python 3.13.0"
    for name, changed in {
        f"source sha256 a1a1a1a1a1a1 -> b2b2b2b2b2b2 ({texts}); restore the files": other,
        "valid source sha256 None -> eeeeeeeeeeee": {**CARD, "valid_source_sha256": "ee" * 32},
        "tokenizer sha256 cdcdcdcdcdcd -> eeeeeeeeeeee": {**CARD, "tokenizer_sha256": "ee" * 32},
        "valid rows sha256 020202020202 -> eeeeeeeeeeee": {
            **CARD,
            "splits": {**splits, "valid": {"sha256": "ee" * 32}},
        },
    }.items():
        with pytest.raises(UserError, match=re.escape(f"the data changed since step 8: {name}")):
            claim_data(tmp_path, changed)
    (tmp_path / DATA).write_text((tmp_path / DATA).read_text().replace("cdcd", "cdce", 1))
    with pytest.raises(UserError, match=r"data\.json: not a data card \(changed since it was written"):
        claim_data(tmp_path, CARD)
    (tmp_path / DATA).unlink()  # as earlier versions left it
    warning = f"warning: no data.json in {tmp_path}: cannot check that the data are unchanged since step 8"
    assert claim_data(tmp_path, other) == warning
    with pytest.raises(UserError, match="b2b2b2b2b2b2 -> a1a1a1a1a1a1"):
        claim_data(tmp_path, CARD)


def test_a_resumed_run_says_what_changed_and_refuses_other_data(tmp_path, monkeypatch):
    said = []

    def train(trials, count, mesh, teacher):
        trials[0].say("trains")
        (trials[0].workdir / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
        return {0: Outcome("finished", None, 4, [], [], 1.0, 1.0, 1.0)}

    def start(**changes):
        said.clear()
        fields = {
            "model.vocab_size": 258,
            "data.source": f"files:{tmp_path}/*.txt",
            "data.tokenizer": "bytes",
            "data.cache_dir": str(tmp_path / "cache"),
        }
        describe = lambda **measured: make_record(data=measured["data"])  # noqa: E731
        return run(tiny_config(**fields, **changes), tmp_path / "run", describe, said.append).data

    monkeypatch.setattr("mobilellm_jax.runs.run.train_together", train)
    (tmp_path / "a.txt").write_text("a line of text\n\n" * 20)
    one = start()
    note = "files:*.txt is one document: its last 10.0% (32 bytes) are held out"
    assert said == [note, "the text is seen 2.5 times (32 rows)", "compiling", "trains"]
    start(**{"train.eval_every": 3})
    assert said[0] == "changed since this run was last started: train.eval_every 100 -> 3"
    assert said[-1] == "trains"
    (tmp_path / "a.txt").write_text("another line of text\n\n" * 20)
    was = one["source_sha256"][:12]
    with pytest.raises(UserError, match=rf"run: the data changed since step 4: source sha256 {was} -> "):
        start()
    assert "trains" not in said


@pytest.mark.parametrize(("steps", "note"), [(4, None), (5, "the text is seen 1.2 times (32 rows)")])
def test_a_run_says_that_it_sees_its_text_more_than_once(steps, note):
    card = {"splits": {"train": {"rows": 32}}}
    assert repeats_note(tiny_config(**{"train.steps": steps}), card) == note


def test_a_run_without_rows_for_tuning_ends_before_it_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.runs.run.train_together", None)
    (tmp_path / "train.jsonl").write_text('{"text": "some text and more"}\n')
    (tmp_path / "valid.jsonl").write_text('{"text": "one document of text"}\n')
    fields = {
        "model.vocab_size": 258,
        "data.source": f"files:{tmp_path}/train.jsonl",
        "data.valid_source": f"files:{tmp_path}/valid.jsonl",
        "data.tokenizer": "bytes",
        "data.cache_dir": str(tmp_path / "cache"),
        "train.eval_split": "tuning",
    }
    with pytest.raises(
        UserError, match=r"valid\.jsonl: the tuning split of the held-out text has no row: 0 "
    ):
        run(tiny_config(**fields), tmp_path / "run", make_record)


def test_the_floor_is_that_of_the_rows_of_the_run(tmp_path):
    texts = [f"{i} text {i * i} and {i % 7} more " * 3 for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = {
        "model.vocab_size": 258,
        "data.source": f"files:{tmp_path}/a.jsonl",
        "data.valid_fraction": 0.3,
        "data.tokenizer": "bytes",
        "data.cache_dir": str(tmp_path / "cache"),
        "train.eval_rows": 11,
        "train.data_seed": 3,
    }
    config = tiny_config(**fields, **{"train.steps": 3})
    prepared = data.prepare(config.data, 258)
    batches = prepared.train_batches(batch_size=8, seed=3)
    train = np.concatenate([next(batches) for _ in range(3)])
    tuning = np.concatenate(list(prepared.eval_batches(batch_size=1, split="tuning")))
    rows = np.concatenate(list(prepared.eval_batches(batch_size=1, rows=11)))
    assert _floor_fields(config, prepared) == ngram_losses(train, tuning, rows, 258)
    assert _floor_fields(config, prepared)["tokens"] == 3 * 8 * LENGTH
    # A run of many epochs counts every row once, with any seed.
    longer = [tiny_config(**{**fields, "train.steps": 900, "train.data_seed": seed}) for seed in (3, 4)]
    one, other = (_floor_fields(config, prepared) for config in longer)
    assert one == other
    assert one["tokens"] == prepared.num_rows("train") * LENGTH
    kept = sorted((prepared.directory / "floors").iterdir())
    assert len(kept) == 2  # of 24 rows, and of all


def byte_fields(path):
    """Overrides of a run on the bytes of one file."""
    return {
        "model.vocab_size": 258,
        "data.source": f"files:{path}",
        "data.tokenizer": "bytes",
        "data.cache_dir": str(path.parent / "cache"),
    }


def test_a_floor_is_counted_once_and_anew_where_its_file_is_corrupt(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some words, and some more of them; " * 60)
    fields = byte_fields(tmp_path / "a.txt")
    config = tiny_config(**fields)
    prepared = data.prepare(config.data, 258)
    counted = []

    def count(*rows):
        counted.append(rows)
        return ngram_losses(*rows)

    monkeypatch.setattr("mobilellm_jax.data.ngrams.ngram_losses", count)
    first = _floor_fields(config, prepared)
    assert _floor_fields(config, prepared) == first
    assert len(counted) == 1
    (kept,) = (prepared.directory / "floors").iterdir()
    kept.write_text(kept.read_text().replace('"trigram": ', '"trigram": 1'))
    assert _floor_fields(config, prepared) == first
    assert _floor_fields(config, prepared) == first
    assert len(counted) == 2
    kept.unlink()
    kept.mkdir()  # cannot be written
    assert _floor_fields(config, prepared) == first


def test_runs_judged_on_tuning_documents_have_no_floor(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "number {i} " }}\n' * 5 for i in range(30)))
    fields = byte_fields(tmp_path / "a.jsonl")
    config = tiny_config(**fields)
    prepared = data.prepare(config.data, 258)
    assert _floor_fields(config, prepared) is not None
    assert _floor_fields(tiny_config(**fields, **{"train.eval_split": "tuning"}), prepared) is None


def test_more_tokens_than_the_limit_have_no_floor_and_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some words, and some more of them; " * 60)
    fields = byte_fields(tmp_path / "a.txt")
    config, said = tiny_config(**fields), []
    prepared, t = data.prepare(config.data, 258), config.train
    tokens = min(t.steps * t.batch_size, prepared.num_rows("train")) * LENGTH
    monkeypatch.setattr("mobilellm_jax.data.ngrams.MOST_TOKENS", tokens)
    assert _floor_fields(config, prepared, said.append) is not None
    assert said == []
    monkeypatch.setattr("mobilellm_jax.data.ngrams.MOST_TOKENS", tokens - 1)
    assert _floor_fields(config, prepared, said.append) is None
    assert said == [f"no n-gram floor: {tokens:,} tokens of training, counted are at most {tokens - 1:,}"]


def test_what_was_opened_is_closed_where_a_run_cannot_start(tmp_path, monkeypatch):
    closed = []

    def fail(*_):
        raise UserError("the log: no space left")

    monkeypatch.setattr(loop, "Progress", fail)
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(self))
    (tmp_path / "a.txt").write_text("some words, and some more of them; " * 60)
    fields = byte_fields(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no space left"):
        run(tiny_config(**fields, **{"mesh.data": 8}), tmp_path / "run", make_record)
    assert len(closed) == 1


def test_a_config_whose_digits_changed_is_refused_and_one_without_a_seal_is_read(tmp_path):
    config, path = tiny_config(), tmp_path / "config.json"
    claim_workdir(tmp_path, config)
    text = path.read_text()
    assert '"width": 24' in text
    path.write_text(text.replace('"width": 24', '"width": 28'))
    with pytest.raises(UserError, match=r"config\.json: not the config of a run \(changed since"):
        read_config(path)
    path.write_text(text.replace('"sha256"', '"sha257"'))
    with pytest.raises(UserError, match=r"config\.json: not the config of a run"):
        read_config(path)
    path.write_text(json.dumps(to_dict(config)))
    assert read_config(path) == to_dict(config)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file/w: cannot write there \(Not a directory\)"):
        claim_workdir(tmp_path / "file" / "w", tiny_config())


@pytest.fixture
def workdir(tmp_path):
    """A run with one checkpoint, that of `random_params`."""
    config = tiny_config()
    claim_workdir(tmp_path, config)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(4, {"params": random_params(config.model), "opt_state": {"count": np.zeros(())}}, None)
    checkpoints.close()
    return tmp_path


def test_a_run_is_opened_without_a_change_to_it(workdir):
    (workdir / "checkpoints" / "5").mkdir()  # as while a save is in progress
    before = sorted(workdir.rglob("*"))
    config, params = open_run(workdir)
    assert config == tiny_config()
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert_trees_close(params, random_params(config.model), tolerance=0)
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.ffn_width", 40, r"blocks/ffn/down has shape \(2, 32, 24\), but \(2, 40, 24\) by"),
        ("model.share_embedding", False, r"head has shape None, but \(48, 24\)"),
        ("model.ffn_kind", "relu", r"blocks/ffn/gate has shape \(2, 24, 32\), but None"),
    ],
)
def test_parameters_of_another_config_are_refused(workdir, field, value, message):
    (workdir / "config.json").write_text(json.dumps(to_dict(tiny_config(**{field: value}))))
    with pytest.raises(UserError, match=message):
        open_run(workdir)


def test_what_is_no_run_is_not_opened(workdir):
    with pytest.raises(UserError, match=r"--workdir=.*/x: no run found, config\.json is missing"):
        open_run(workdir / "x")
    assert not (workdir / "x").exists()
    (workdir / "checkpoints" / "4" / "_METADATA").write_text("")
    with pytest.raises(UserError, match=r"no checkpoint is intact.*4/_METADATA has changed"):
        open_run(workdir)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match="checkpoints: there is no checkpoint"):
        open_run(workdir)


def test_a_tokenizer_that_is_not_that_of_the_run_is_refused(tmp_path):
    trained, other = (train_bpe("bpe:300", [text]) for text in ("some words and some more words", "ab ab"))
    save_tokenizer(trained, tmp_path / TOKENIZER)
    (tmp_path / DATA).write_text(json.dumps(seal({"tokenizer_sha256": trained.sha256})))
    assert open_tokenizer(tmp_path).sha256 == trained.sha256
    shutil.rmtree(tmp_path / TOKENIZER)
    save_tokenizer(other, tmp_path / TOKENIZER)
    with pytest.raises(
        UserError, match=f"sha256 {other.sha256[:12]}, but the run was trained with .*restore"
    ):
        open_tokenizer(tmp_path)


def test_a_run_keeps_its_tokenizer(workdir):
    assert open_tokenizer(workdir) is None
    tokenizer = train_bpe("bpe:300", ["some words and some more words"])
    save_tokenizer(tokenizer, workdir / TOKENIZER)
    restored = open_tokenizer(workdir)
    assert (restored.sha256, restored.bos_id, restored.eos_id) == (tokenizer.sha256, 0, 1)
    assert restored.encode_batch(["some words"]) == tokenizer.encode_batch(["some words"])
    (workdir / TOKENIZER / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="corrupt tokenizer"):
        open_tokenizer(workdir)


def test_bos_comes_first_as_in_training_and_for_imported_models_as_in_transformers(tmp_path):
    tokenizer = train_bpe("bpe:260", ["ab ab"])  # has a BOS, which it adds to no text
    assert begins_with_bos(tmp_path, tokenizer)
    (tmp_path / IMPORTED).write_text("{}")
    assert not begins_with_bos(tmp_path, tokenizer)
    without = HuggingFaceTokenizer(tokenizer.spec, tokenizer.file_bytes, bos_id=None, eos_id=1)
    (tmp_path / IMPORTED).unlink()
    assert not begins_with_bos(tmp_path, without)


def test_a_record_has_the_last_and_the_best_of_all_evaluations():
    def evaluation(step, loss):
        return {"step": step, "loss": loss, "bits_per_byte": None, "error": None}

    evaluations = [evaluation(4, 3.0), evaluation(8, 1.0), evaluation(12, 2.0), evaluation(13, None)]
    outcome = Outcome(
        status="diverged",
        error="the loss is not finite",
        steps=13,
        evaluations=evaluations,
        train_curve=[[step, 1.0] for step in range(1, 251)],
        train_s=2.0,
        compile_s=3.0,
        wall_s=6.0,
    )
    config, card = tiny_config(), {"source_sha256": "a"}
    fields = measured_fields(config, card, outcome)
    assert fields["final"] == evaluation(12, 2.0)
    assert fields["best"] == evaluation(8, 1.0)
    assert fields["evaluations"] == evaluations
    tokens = 13 * config.train.batch_size * config.data.sequence_length
    assert (fields["steps"], fields["tokens_seen"], fields["data"]) == (13, tokens, card)
    assert (fields["status"], fields["error"]) == (outcome.status, outcome.error)
    assert fields["train_curve"] == [[step, 1.0] for step in range(2, 251, 2)]
    timing = {"wall_s": 6.0, "compile_s": 3.0, "train_s": 2.0, "tokens_per_second": tokens / 2}
    assert fields["timing"] == timing


def test_a_curve_is_thinned_to_its_last_point():
    assert thin(list(range(10)), 4) == [0, 3, 6, 9]
    assert thin([1, 2], 4) == [1, 2]


def test_the_record_names_the_processor():
    device = provenance.device()
    assert device["platform"] == "cpu"
    assert device["kind"] in Path("/proc/cpuinfo").read_text() + platform.machine()
    assert (device["count"], device["cores"]) == (8, len(os.sched_getaffinity(0)))


def test_compiled_programs_are_kept_where_jax_is_told_to(monkeypatch):
    kept = {}
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    enable_compilation_cache()
    assert kept.pop("jax_compilation_cache_dir") == str(Path.home() / ".cache/mobilellm_jax/xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    enable_compilation_cache()
    assert "jax_compilation_cache_dir" not in kept
