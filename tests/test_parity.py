"""Exported models in transformers, which shares no code with this project: logits, loss, gradients, text.

Skipped without PyTorch and transformers: python -m pip install -e '.[hf]'.
"""

import functools
import json
import lzma
import re
from itertools import pairwise
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from commands import command
from conftest import (
    SHARING,
    apply,
    loss_and_gradients,
    random_batch,
    random_params,
    tiny_config,
)

from configs import base
from mobilellm_jax.analysis.records import read_record
from mobilellm_jax.config import to_dict
from mobilellm_jax.data import save_tokenizer
from mobilellm_jax.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, train_bpe
from mobilellm_jax.formats import huggingface
from mobilellm_jax.formats.huggingface_weights import places
from mobilellm_jax.runs.directory import TOKENIZER, begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.storage.checkpoint import Checkpoints

WITHOUT = "not installed: python -m pip install -e '.[hf]'"
torch = pytest.importorskip("torch", reason=f"PyTorch is {WITHOUT}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {WITHOUT}")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STORIES = Path(__file__).parents[2] / "shared/data/weights/stories260K"
BOOKS = STORIES.parents[1] / "corpora/storybooks_en.jsonl.xz"
TEXT = "One day, Lily went  to the park.\n\tShe saw a big é 中 🙂!  "


def random_shape(i):
    """Returns fields of a model; every sharing strategy comes up as often."""
    rng = np.random.default_rng(i)
    kv_heads, groups, wide = rng.integers(1, 4, 3)
    heads = int(kv_heads * groups)
    return {
        "vocab_size": int(rng.integers(20, 100)),
        "depth": 2,
        "width": heads * int(rng.integers(3, 9) * wide),
        "num_heads": heads,
        "num_kv_heads": int(kv_heads),
        "head_dim": 2 * int(rng.integers(1, 17)),
        "ffn_width": int(rng.integers(8, 100)),
        "share_embedding": bool(rng.integers(2)),
        "rope_base": float(rng.choice([100.0, 10_000.0, 500_000.0])),
        "norm_epsilon": float(rng.choice([1e-6, 1e-5, 1e-2])),
        **SHARING[i % len(SHARING)],
    }


def export(tmp_path, config, params, tokenizer=None):
    """Writes a run and exports it; returns the folder."""
    workdir, target = tmp_path / "run", tmp_path / "out"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(1, {"params": params}, None)
    checkpoints.close()
    if tokenizer is not None:
        save_tokenizer(tokenizer, workdir / TOKENIZER)
    huggingface.export_run(workdir, target, "float32")
    return target


def load(folder, dtype="float32"):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert type(loaded) is transformers.LlamaForCausalLM
    return loaded


def error(actual, expected):
    """Returns the largest error, relative to the largest entry."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def random_run(i, **overrides):
    """Returns the config and the parameters of a shape; larger weights would turn rounding into chaos."""
    config = tiny_config(
        **{f"model.{name}": value for name, value in {**random_shape(i), **overrides}.items()}
    )
    scale = min(1.0, 4 / config.model.width**0.5)
    params = random_params(config.model)
    params["blocks"] = jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 2 else leaf, params["blocks"])
    return config, params


@pytest.mark.parametrize("i", range(20))
def test_logits_loss_and_gradients_equal_transformers(tmp_path, i, record_property):
    config, params = random_run(i)
    m, theirs = config.model, load(export(tmp_path, config, params))
    assert theirs.config.num_hidden_layers == m.effective_depth
    tokens_BT, targets_BT = random_batch(m)
    logits_BTV = theirs(torch.tensor(tokens_BT).long()).logits
    nats = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), torch.tensor(targets_BT).long().ravel(), ignore_index=-1, reduction="sum"
    )
    nats.backward()
    expected = jax.tree.map(np.zeros_like, params)
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    for name, place in places(m, m.plan).items():  # a shared block gets the sum over its copies
        leaf, gradient = place.leaf(expected), gradients.pop(name)
        leaf += place.read(gradient, leaf)
    assert not gradients
    (ours, _), actual = loss_and_gradients(params, tokens_BT, targets_BT, m)
    errors = {
        "logits": error(apply(params, tokens_BT, m), logits_BTV.detach().numpy()),
        "loss": abs(float(ours) / nats.item() - 1),
        "gradients": max(jax.tree.leaves(jax.tree.map(error, actual, expected))),
    }
    record_property("figures", {f"transformers, float32, {name}": e for name, e in errors.items()})
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("i", range(5))
def test_bfloat16_is_no_further_from_float32_than_theirs(tmp_path, i, record_property):
    config, params = random_run(i)
    params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    tokens_BT, _ = random_batch(config.model)
    with torch.no_grad():
        theirs = load(export(tmp_path, config, params), "bfloat16")(torch.tensor(tokens_BT).long()).logits
    ours = apply(params, tokens_BT, random_run(i, compute_dtype="bfloat16")[0].model)
    exact = apply(params, tokens_BT, config.model)
    errors = {"ours": error(ours, exact), "theirs": error(theirs.float().numpy(), exact)}
    record_property("figures", {f"bfloat16, logits, {name}": e for name, e in errors.items()})
    assert 0 < np.std(ours - exact) < 1.5 * np.std(theirs.float().numpy() - exact)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")
def test_transformers_tells_the_same_story_after_a_round_trip(tmp_path):
    huggingface.import_run(STORIES, tmp_path / "run", base.get_config())
    huggingface.export_run(tmp_path / "run", tmp_path / "out", "float32")
    greedy = json.loads((STORIES / "reference.json").read_text())["greedy_ids"]
    with torch.no_grad():
        logits_TV = load(tmp_path / "out")(torch.tensor([greedy])).logits[0]
    assert logits_TV.argmax(-1).tolist()[:-1] == greedy[1:]


def stories_encoder():
    """Ids of a text in the vocabulary of stories260K, as llama2.c finds them: the best merge first.

    No piece goes on after a space, so that words can be encoded one by one.
    """
    content, entries = (STORIES / "tok512.bin").read_bytes(), []
    place = 4  # behind the length of the longest piece
    while place < len(content):
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        score = float(np.frombuffer(content[place : place + 4], "<f4")[0])
        entries.append((content[place + 8 : place + 8 + size], score))
        place += 8 + size
    ids = {piece: i for i, (piece, _) in enumerate(entries)}

    @functools.cache
    def word(text):
        found = []
        for letter in text:
            piece = letter.encode()
            found += [ids[piece]] if piece in ids else [3 + byte for byte in piece]
        while True:
            joined = [ids.get(entries[a][0] + entries[b][0]) for a, b in pairwise(found)]
            scores = [-np.inf if i is None else entries[i][1] for i in joined]
            if not scores or max(scores) == -np.inf:
                return found
            best = int(np.argmax(scores))
            found[best : best + 2] = [joined[best]]

    return lambda text: [1, *(i for part in re.findall(r" ?[^ ]*", f" {text}") for i in word(part))]


@pytest.mark.slow
@pytest.mark.skipif(not BOOKS.is_file(), reason=f"{BOOKS} is not there")
def test_stories260k_learns_from_other_stories_and_transformers_agrees(tmp_path, record_property):
    """Imported, trained further on children's books and exported by the commands, as in docs/howto."""
    encode = stories_encoder()
    greedy = json.loads((STORIES / "reference.json").read_text())["greedy_ids"]
    text = (STORIES / "greedy_256.txt").read_text()
    assert encode(text.strip())[:200] == greedy[:200]
    with lzma.open(BOOKS, "rt") as file:
        ids = [encode(json.loads(line)["text"]) for line in file]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"token_ids": of}) + "\n" for of in ids))

    def do(name, *flags):
        done = command(f"experiments.{name}", *flags)
        assert done.returncode == 0, done.stderr

    do("import_hf", f"--source={STORIES}", f"--workdir={tmp_path}/run")
    fields = {
        "data.source": f"tokens:{tmp_path}/ids.jsonl",
        "data.cache_dir": f"{tmp_path}/cache",
        "data.sequence_length": 256,
        "train.batch_size": 8,
        "train.eval_rows": 64,
        "optimizer.learning_rate": 1e-3,
    }
    losses = {}
    for steps in (1, 60):  # the rate of the first step is 0
        given = {**fields, "train.steps": steps, "optimizer.warmup_steps": min(steps, 10)}
        flags = [f"--config.{name}={value}" for name, value in given.items()]
        workdir = tmp_path / f"steps{steps}"
        do("train", f"--config=configs/finetune.py:{tmp_path}/run", f"--workdir={workdir}", *flags)
        record = read_record(workdir / "record.json")
        losses[steps] = record.loss
        assert record.parent["run"] == "run"
    assert losses[60] < losses[1] - 0.3
    do("export", f"--workdir={tmp_path}/steps60", f"--out={tmp_path}/out")
    config, params = open_run(tmp_path / "steps60")
    tokens = np.array([ids[0][:256]])
    with torch.no_grad():
        theirs = load(tmp_path / "out")(torch.tensor(tokens)).logits.numpy()
    difference = error(np.asarray(apply(params, tokens, config.model)), theirs)
    assert difference < 5e-6
    record_property("figures", {"held-out loss on books, before": losses[1], "after 60 steps": losses[60]})


def bpe(tmp_path):
    return train_bpe("bpe:300", [TEXT] * 3)


def sentencepieces(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(["some words and more words", "a park and a day"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer("sentencepiece:sp.model", (tmp_path / "sp.model").read_bytes())


@pytest.mark.parametrize(
    "make", [bpe, sentencepieces, lambda _: BytesTokenizer()], ids=["bpe", "sentencepiece", "bytes"]
)
def test_the_tokenizer_makes_the_same_ids(tmp_path, make):
    tokenizer = make(tmp_path)
    config = tiny_config(**{"model.vocab_size": 300})
    folder = export(tmp_path, config, random_params(config.model), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, "  " + TEXT, "a", ""):
        ids = tokenizer.encode_batch([text])[0]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *ids]  # as in training and evaluation
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    huggingface.import_run(folder, tmp_path / "back", base.get_config())
    back = open_tokenizer(tmp_path / "back")
    assert back.encode_batch([TEXT]) == tokenizer.encode_batch([TEXT])
    assert begins_with_bos(tmp_path / "back", back)
    huggingface.export_run(tmp_path / "back", tmp_path / "again", "float32")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
