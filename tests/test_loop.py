"""`loop.train` against a plain loop: which seed goes where, which rate belongs to which step, what is kept.

The other tests of the loop compare it with itself: resumed with straight, 8 devices with one.
"""

import functools
import json
import math
import re
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import BATCH, assert_trees_close, init, tiny_config

from mobilellm_jax import data, model
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.parallel import partition
from mobilellm_jax.storage import checkpoint
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.training import loop, memory, progress
from mobilellm_jax.training.held_out import evaluate_held_out
from mobilellm_jax.training.loop import train
from mobilellm_jax.training.optimizer import learning_rate_schedule

INIT_SEED, DATA_SEED = 3, 5
WORDS = [f"word{i}" for i in range(17)]
# Held-out text shares words with the training text, but the loss on it soon rises: its best is not the last.
TRAIN = [" ".join(WORDS[i * j % 17] for j in range(40)) for i in range(60)]
VALID = [f"word {i} {'é' * (i % 5)}" for i in range(20)]
FIELDS = {
    "model.vocab_size": 264,
    "optimizer.epsilon": 1e-3,  # the sign of a gradient near 0 is rounding error
    "optimizer.warmup_steps": 3,
    "optimizer.learning_rate": 0.15,
    "optimizer.clip_norm": 0.3,
    "train.accumulation_steps": 2,
    "train.init_seed": INIT_SEED,
    "train.data_seed": DATA_SEED,
    "train.steps": 12,
    "train.eval_every": 3,
    "train.eval_rows": 11,  # the last batch is not full
    "train.checkpoint_every": 3,
    "train.log_every": 1,
}
TASK = {
    "data.source": "recall:pairs=2,symbols=2,queries=2",
    "data.valid_source": "",
    "optimizer.schedule": "wsd",
    "train.steps": 7,  # the last is evaluated, saved and logged though nothing is due
    "train.log_every": 3,
}


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.value_and_grad, has_aux=True)
def naive_loss(params, rows_BS, config):
    """Returns nats per target; besides them for each row its nats, its targets, and whether one is wrong."""
    tokens_BT, targets_BT = jnp.where(rows_BS < 0, ~rows_BS, rows_BS)[:, :-1], rows_BS[:, 1:]
    logits_BTV = model.apply(params, tokens_BT, config)
    is_target_BT = targets_BT >= 0
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.maximum(targets_BT, 0))
    nats_B, count_B = (nats_BT * is_target_BT).sum(axis=1), is_target_BT.sum(axis=1)
    wrong_B = jnp.any((logits_BTV.argmax(axis=-1) != targets_BT) & is_target_BT, axis=1)
    return nats_B.sum() / count_B.sum(), (nats_B, count_B, wrong_B)


def held_out_scores(params, rows, config):
    """Returns the loss in nats per token over all rows, and the share of rows with a wrong answer."""
    filled = np.full((-(-len(rows) // BATCH) * BATCH, rows.shape[1]), -1)
    filled[: len(rows)] = rows
    parts = [naive_loss(params, batch, config)[0][1] for batch in filled.reshape(-1, BATCH, rows.shape[1])]
    nats, count, wrong = (np.concatenate(part)[: len(rows)] for part in zip(*parts, strict=True))
    return nats.sum() / count.sum(), wrong.mean()


def plain_loop(config, prepared):
    """Yields training loss, norm of the gradient, parameters after the step, and their held-out scores."""
    o, t = config.optimizer, config.train
    params, rates = init(jax.random.key(INIT_SEED), config.model), learning_rate_schedule(o, t.steps)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "gain" not in str(path), params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(rates, o.beta1, o.beta2, o.epsilon, weight_decay=o.weight_decay, mask=mask),
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    batches = prepared.train_batches(batch_size=t.batch_size, seed=DATA_SEED)
    held_out = np.concatenate(list(prepared.eval_batches(batch_size=1, rows=t.eval_rows)))
    for _ in range(t.steps):
        (loss, _), grads = naive_loss(params, next(batches), config.model)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield loss, optax.tree.norm(grads), params, held_out_scores(params, held_out, config.model)


@pytest.fixture
def now(monkeypatch):
    """The time of the run's clock: a step takes 1 s, an evaluation 100 s, a checkpoint 1,000 s."""
    now = [0.0]

    def taking(seconds, function):
        def wrapped(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return wrapped

    def read():
        now[0] += 1e-6  # no two readings are equal
        return now[0]

    place = taking(1.0, jax.make_array_from_process_local_data)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", place)
    monkeypatch.setattr(loop, "evaluate_held_out", taking(100.0, evaluate_held_out))
    monkeypatch.setattr(Checkpoints, "save", taking(1000.0, Checkpoints.save))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=read, time=time.time))
    return now


@pytest.mark.parametrize("task", [{}, TASK], ids=["text", "task"])
def test_the_loop_is_a_plain_loop(tmp_path, monkeypatch, now, task):
    for name, documents in (("train", TRAIN), ("valid", VALID)):
        (tmp_path / name).mkdir()
        for i, document in enumerate(documents):
            (tmp_path / name / f"{i}.txt").write_text(document)
    text = {
        "data.source": f"files:{tmp_path}/train/*.txt",
        "data.valid_source": f"files:{tmp_path}/valid/*.txt",
        "data.tokenizer": "bytes",
        "data.cache_dir": str(tmp_path / "cache"),
    }
    config = tiny_config(**{**FIELDS, **text, **task})
    prepared = data.prepare(config.data, config.model.vocab_size)
    workdir, steps = tmp_path / "run", config.train.steps
    workdir.mkdir()
    at_save = {}  # lines of the log that are on disk when a checkpoint is saved
    save = Checkpoints.save

    def save_and_look(self, step, state, loss):
        at_save[step] = (workdir / "metrics.jsonl").read_text()
        save(self, step, state, loss)

    monkeypatch.setattr(Checkpoints, "save", save_and_look)
    mesh = partition.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    said, asked, polls = [], [], []
    monkeypatch.setattr(memory, "check_fits", lambda _, config, trials: asked.append(config))
    monkeypatch.setattr(Checkpoints, "poll", lambda self: polls.append(self))
    outcome = train(config, prepared, mesh, workdir, said.append)

    losses, norms, params, scores = zip(*plain_loop(config, prepared), strict=True)
    rates = [learning_rate_schedule(config.optimizer, steps)(i) for i in range(steps)]
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = {kind: [line for line in log if line["kind"] == kind] for kind in ("train", "eval", "save")}
    logged = list(range(1, 13)) if not task else [3, 6, 7]
    evaluated = [3, 6, 9, 12] if not task else [3, 6, 7]
    assert (outcome.status, outcome.steps) == ("finished", steps)
    assert (asked, len(polls)) == ([config], steps)  # for the memory, and for saves that failed
    assert [line["step"] for line in lines["train"]] == logged
    for name, all_steps, tolerance in (
        ("loss", losses, 1e-4),
        ("grad_norm", norms, 1e-3),
        ("learning_rate", rates, 1e-6),
    ):
        expected = [float(all_steps[step - 1]) for step in logged]
        np.testing.assert_allclose([line[name] for line in lines["train"]], expected, tolerance, err_msg=name)
    assert max(norms) > config.optimizer.clip_norm
    assert outcome.train_curve == [[line["step"], line["loss"]] for line in lines["train"]]
    assert [e["step"] for e in outcome.evaluations] == evaluated
    held_out, errors = np.transpose([scores[step - 1] for step in evaluated])
    np.testing.assert_allclose([e["loss"] for e in outcome.evaluations], held_out, rtol=1e-4)
    if task:
        assert [e["error"] for e in outcome.evaluations] == pytest.approx(errors)
        assert {e["bits_per_byte"] for e in outcome.evaluations} == {None}
    else:
        in_order = sorted(range(len(VALID)), key=lambda i: f"{i}.txt")
        compared = [VALID[i] for place, i in enumerate(in_order) if place % 3 != 1]
        size = sum(len(document.encode()) for document in compared)
        per_token = size / (size + 2 * len(compared) - 1)  # BOS and EOS of each; nothing predicts the first
        bits = [e["bits_per_byte"] for e in outcome.evaluations]
        np.testing.assert_allclose(bits, held_out / math.log(2) / per_token, rtol=1e-4)
        assert {e["error"] for e in outcome.evaluations} == {None}

    # By position and by document, of the last evaluation; the same where it is only resumed after its end.
    resumed = train(config, prepared, mesh, workdir, said.append)
    for found in (outcome, resumed):
        if task:
            assert found.by_position is found.documents is None
            continue
        rows = np.concatenate(list(prepared.eval_batches(batch_size=1, rows=config.train.eval_rows)))
        logits = model.apply(params[-1], jnp.asarray(rows[:, :-1]), config.model)
        log_p = np.asarray(jax.nn.log_softmax(logits))
        nats = -np.take_along_axis(log_p, rows[:, 1:, None], axis=2)[..., 0]
        bins = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 9)]
        expected = {
            "to": [end for _, end in bins],
            "loss": pytest.approx([nats[:, start:end].mean() for start, end in bins], rel=1e-3),
            "targets": [11 * (end - start) for start, end in bins],
        }
        assert found.by_position == expected
        document = prepared.eval_documents(config.train.eval_rows, "valid")
        of = [nats[document == number] for number in np.unique(document)]
        assert found.documents == {
            "nats": pytest.approx([x.sum() for x in of], rel=1e-3),
            "targets": [x.size for x in of],
        }

    # Time: of steps alone.
    assert [line["train_s"] for line in lines["save"]] == pytest.approx(evaluated, abs=0.01)
    assert outcome.train_s == pytest.approx(steps, abs=0.01)
    if task:  # 8 rows of 9 tokens a second
        assert re.fullmatch(r"step 3/7  loss \d\.\d{4}  72 tokens/s  0:04 left", said[0])

    # Checkpoints: the log is on disk before, the two latest and the best are there after.
    assert list(at_save) == evaluated
    for step, text in at_save.items():
        there = [json.loads(line) for line in text.splitlines()]
        assert [line["kind"] for line in there if line["step"] == step] == ["train", "eval", "save"]
    best = evaluated[np.argmin(held_out)]
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert kept == {best, *evaluated[-2:]}
    assert task or best < evaluated[-2]
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), config.model))
    for step in sorted(kept, reverse=True):
        saved = checkpoint.load_params(workdir / "checkpoints", like)
        assert_trees_close(saved, jax.device_get(params[step - 1]), tolerance=1e-3)
        shutil.rmtree(workdir / "checkpoints" / str(step))
