"""GGUF files: tensors read back by the gguf package, logits and token ids computed by llama.cpp."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers as library
from commands import command
from conftest import SHARING, apply, random_params, tiny_config, tiny_model
from test_data_tokenizers import sentencepiece_model
from test_huggingface import import_, make_run

from mobilellm_jax.data import chat
from mobilellm_jax.data.tokenizers import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    train_bpe,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import gguf as ours
from mobilellm_jax.formats import gguf_parity, llama_cpp
from mobilellm_jax.formats.gguf_tokenizer import vocabulary
from mobilellm_jax.formats.parity import ParityError
from mobilellm_jax.runs.directory import TOKENIZER
from mobilellm_jax.runs.opening import open_run

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.installed(), reason="llama.cpp is not installed")

STORIES = Path(__file__).parents[2] / "shared/data/weights/stories260K"
TEXT = "One day, Lily went  to the park.\n\tShe saw a big é 中 🙂! It's 3.14 or 1,000's of them. " * 3
LLAMA = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "byte_fallback": True}
TOKENIZERS = {
    "bpe": lambda: train_bpe("bpe:300", [TEXT]),
    "bytes": BytesTokenizer,
    "sentencepiece": lambda: SentencePieceTokenizer(
        "sentencepiece:x.model", sentencepiece_model(vocab_size=400, **LLAMA)
    ),
    "sentencepiece, no space in front": lambda: SentencePieceTokenizer(
        "sentencepiece:x.model", sentencepiece_model(vocab_size=400, add_dummy_prefix=False, **LLAMA)
    ),
}


def run_of(path, tokenizer=None, change=lambda params: None, **fields):
    """Makes a run with random weights; returns its config and parameters."""
    config = tiny_config(**{f"model.{name}": value for name, value in fields.items()})
    params = random_params(config.model)
    change(params)
    make_run(path, config, params, tokenizer)
    return config, params


def read(path):
    """The keys and the tensors of a file, numbers of few bits as float32."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def expected_tensors(params, m):
    """The tensors of a model in llama.cpp's layout, by a plain loop over layers, heads and pairs."""

    def rows(w):  # [D, heads, H] -> [heads * H, D], pairs as neighbours
        return np.array(
            [w[:, n, i + j] for n in range(w.shape[1]) for i in range(H // 2) for j in (0, H // 2)]
        )

    H, D = m.head_dim, m.width
    found = {"token_embd.weight": params["embedding"], "output_norm.weight": params["final_norm"]["gain"]}
    if not m.share_embedding:
        found["output.weight"] = params["head"]
    for layer, u in enumerate(m.plan):
        block = jax.tree.map(lambda w, u=u: w[u], params["blocks"])
        attention, ffn = block["attention"], block["ffn"]
        tensors = {
            "attn_norm": block["attention_norm"]["gain"],
            "attn_q": rows(attention["query"]),
            "attn_k": rows(attention["key"]),
            "attn_v": attention["value"].reshape(D, -1).T,
            "attn_output": attention["output"].reshape(-1, D).T,
            "ffn_norm": block["ffn_norm"]["gain"],
            "ffn_gate": ffn["gate"].T,
            "ffn_up": ffn["up"].T,
            "ffn_down": ffn["down"].T,
        }
        found |= {f"blk.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
    return found


# --- the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharing", SHARING[1::3], ids=str)
def test_tensors_and_shape_read_back(tmp_path, monkeypatch, tied, sharing):
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    config, params = run_of(tmp_path / "run", share_embedding=tied, rope_base=500.0, **sharing)
    m = config.model
    done = ours.export_run(tmp_path / "run", tmp_path / "out.gguf", "f32")
    keys, tensors = read(tmp_path / "out.gguf")
    expected = expected_tensors(params, m)
    assert tensors.keys() == expected.keys() == done.kinds.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    assert done.parity is None
    assert {name.removeprefix("llama."): v for name, v in keys.items() if name.startswith("llama.")} == {
        "vocab_size": m.vocab_size,
        "context_length": config.data.sequence_length,
        "embedding_length": m.width,
        "block_count": m.effective_depth,
        "feed_forward_length": m.ffn_width,
        "attention.head_count": m.num_heads,
        "attention.head_count_kv": m.num_kv_heads,
        "attention.key_length": m.head_dim,
        "attention.value_length": m.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(m.norm_epsilon),
        "rope.freq_base": 500.0,
        "rope.dimension_count": m.head_dim,
    }
    assert keys["general.name"] == "run"
    assert keys["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize(
    ("kind", "most", "code"),
    [("f16", 2**-11, 1), ("bf16", 2**-8, 32), ("q8_0", 1 / 254 + 2**-11, 7), ("q4_0", 1 / 8, 2)],
)
def test_few_bits_round_once(tmp_path, monkeypatch, kind, most, code):
    """Errors are at most a part of the largest weight; the scales of groups are f16. Gains are exact."""
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    config, params = run_of(tmp_path / "run", width=32, head_dim=16, ffn_width=24)
    done = ours.export_run(tmp_path / "run", tmp_path / "out.gguf", kind, mixed=True)
    keys, tensors = read(tmp_path / "out.gguf")
    assert keys["general.file_type"] == code
    for name, expected in expected_tensors(params, config.model).items():
        kept = {"ffn_down": "f16" if kind[0] == "q" else kind}.get(name.split(".")[-2], kind)
        assert done.kinds[name] == ("f32" if "norm" in name else kept)
        if "norm" in name:
            assert np.array_equal(tensors[name], expected)
        else:
            error = np.abs(tensors[name] - expected).max()
            assert 0 < error <= np.abs(expected).max() * (most if kept == kind else 2**-11)


# --- llama.cpp ------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_computes_the_same_logits_and_ids(tmp_path, name, record_property):
    """With shared blocks, multipliers, grouped queries and a vocabulary larger than the tokenizer's."""
    tokenizer = TOKENIZERS[name]()
    fields = {"parameterization": "completep", "base_width": 7, "base_depth": 3, "sharing": "reverse"}
    config, params = run_of(tmp_path / "run", tokenizer, vocab_size=410, num_repeats=2, **fields)
    done = ours.export_run(tmp_path / "run", tmp_path / "out.gguf", "f32")
    assert (done.parity.positions, done.parity.agreeing, done.parity.rounding) == (9, 9, 0)
    assert done.parity.texts == len(gguf_parity.TEXTS) + 1
    ids = np.random.default_rng(5).integers(0, 410, 9)
    expected = apply(params, ids[None].astype(np.int32), config.model)[0]
    with llama_cpp.Model(tmp_path / "out.gguf", context=64) as there:
        logits = there.logits(ids.tolist())
        texts = [TEXT, TEXT.swapcase(), " \n \t  x", "".join(map(chr, range(1, 400)))]
        found = [there.tokenize(text) for text in texts]
        first = there.greedy(ids.tolist(), 3)
        assert there.greedy(ids.tolist(), 3) == first  # each text is read anew
    assert found == [[tokenizer.bos_id, *of] for of in tokenizer.encode_batch(texts)]
    assert first[0] == expected[-1].argmax()
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    record_property("figures", {"f32 logits of llama.cpp, of the largest": float(difference)})
    assert difference <= 4e-6  # of this, the rounded products with multipliers make up to 1.6e-6


@needs_llama_cpp
def test_uses_that_differ_are_written_out(tmp_path):
    extras = {"loop_gains": True, "loop_rank": 2, "loop_scale": "learned"}
    config, params = run_of(tmp_path / "run", sharing="reverse", num_repeats=2, **extras)
    done = ours.export_run(tmp_path / "run", tmp_path / "out.gguf", "f32")
    assert (done.config.model, done.parity.agreeing) == (config.model, 9)
    ids = np.random.default_rng(5).integers(0, 48, 9)
    expected = apply(params, ids[None].astype(np.int32), config.model)[0]
    with llama_cpp.Model(tmp_path / "out.gguf", context=64) as there:
        np.testing.assert_allclose(there.logits(ids.tolist()), expected, atol=1e-4 * np.abs(expected).max())


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_parity_with_rounded_weights(tmp_path, kind):
    _, _ = run_of(tmp_path / "run", width=32, head_dim=16, ffn_width=32, sharing="0 1 0 0")
    done = ours.export_run(tmp_path / "run", tmp_path / "out.gguf", kind)
    least = {"f16": 1e-5, "bf16": 1e-4, "q8_0": 1e-4, "q4_0": 1e-2}[kind]
    assert done.parity.difference <= gguf_parity.BOUNDS[kind]
    assert least < done.parity.rounding < 0.5


@needs_llama_cpp
def test_what_differs_gets_no_name(tmp_path, monkeypatch):
    run_of(tmp_path / "run", TOKENIZERS["bpe"](), vocab_size=300)
    monkeypatch.setattr(ours, "_permute", lambda tensor, place, config: tensor)
    with pytest.raises(ParityError, match=r"differ from those of the run by .* expected at most"):
        ours.export_run(tmp_path / "run", tmp_path / "out.gguf", "f32")
    monkeypatch.undo()
    monkeypatch.setattr(ours, "begins_with_bos", lambda workdir, tokenizer: False)
    monkeypatch.setattr(gguf_parity, "TEXTS", ["<eos>"])
    monkeypatch.setattr(BytesTokenizer, "encode_batch", lambda self, texts: [[1]] * len(texts))
    run_of(tmp_path / "bytes", BytesTokenizer(), vocab_size=300)
    with pytest.raises(ParityError, match=r"'<eos>': llama.cpp encodes it to \[60, 101, 111, 115, 62\]"):
        ours.export_run(tmp_path / "bytes", tmp_path / "out.gguf", "f32")
    assert sorted(os.listdir(tmp_path)) == ["bytes", "run"]


@needs_llama_cpp
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")
def test_stories260k_says_the_same_in_llama_cpp(tmp_path, record_property):
    import_(STORIES, tmp_path / "run")
    ours.export_run(tmp_path / "run", tmp_path / "out.gguf", "f32")
    greedy = json.loads((STORIES / "reference.json").read_text())["greedy_ids"]
    with np.load(STORIES / "reference_logits.npz") as file:
        ids, expected = file["ids"].tolist(), file["logits"]
    with llama_cpp.Model(tmp_path / "out.gguf", context=256) as there:
        assert there.greedy(greedy[:1], 255) == greedy[1:]
        difference = np.abs(there.logits(ids) - expected).max() / np.abs(expected).max()
    record_property("figures", {"f32 logits of stories260K in llama.cpp, of the largest": float(difference)})
    assert difference <= 2e-6


@needs_llama_cpp
def test_llama_cpp_says_what_it_refuses(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"x\.gguf: llama\.cpp cannot load it: .*failed to load"):
        llama_cpp.Model(tmp_path / "x.gguf", context=9)
    with pytest.raises(UserError, match=r"x\.gguf: cannot be loaded"):
        llama_cpp.load(tmp_path / "x.gguf")


# --- bad input ------------------------------------------------------------------------------------------


def fill(path, value):
    def change(params):
        branch = params
        *rest, last = path.split("/")
        for name in rest:
            branch = branch[name]
        branch[last][...] = value

    return change


@pytest.mark.parametrize(
    ("fields", "change", "kind", "message"),
    [
        ({"ffn_kind": "relu"}, None, "f32", r"model\.ffn_kind: 'relu' cannot be exported as a Llama"),
        (
            {},
            None,
            "q8_0",
            r"--type=q8_0: .* groups of 32 .* model\.width=24 makes rows of 24 \(32 would fit\); "
            r"model\.num_heads=4 of model\.head_dim=10 makes rows of 40 \(32 or 64 would fit\); use --type",
        ),
        (
            {"sharing": "0 1 0 0", "loop_embedding": True},
            None,
            "f32",
            r"^--format=gguf: model\.loop_embedding=True changes the state between blocks",
        ),
        ({}, ("embedding", np.nan), "f32", r"token_embd\.weight: has NaN or infinite weights"),
        ({}, ("blocks/ffn/up", 0.0), "f32", r"blk\.0\.ffn_up\.weight: all weights are 0"),
        ({}, ("blocks/ffn/up", 1e5), "f16", r"--type=f16: blk\.0\.ffn_up\.weight has weights .* too large"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path, fields, change, kind, message):
    run_of(tmp_path / "run", None, *[fill(*change)] if change else [], **fields)
    with pytest.raises(UserError, match=message):
        ours.export_run(tmp_path / "run", tmp_path / "out.gguf", kind)
    assert os.listdir(tmp_path) == ["run"]


def test_files_are_made_whole_and_never_written_over(tmp_path, monkeypatch, small_disk):
    run_of(tmp_path / "run", width=512, ffn_width=512)
    (tmp_path / "there.gguf").write_text("x")
    with pytest.raises(UserError, match=r"--out=.*there\.gguf: already exists"):
        ours.export_run(tmp_path / "run", tmp_path / "there.gguf", "f32")
    with pytest.raises(UserError, match=r"--out=.*out\.gguf: cannot write there"):
        ours.export_run(tmp_path / "run", small_disk / "out.gguf", "f32")
    assert not os.listdir(small_disk)
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--format=gguf: needs .* pip install -e '\.\[gguf\]'"):
        ours.export_run(tmp_path / "run", tmp_path / "out.gguf", "f32")
    assert (tmp_path / "there.gguf").read_text() == "x"


def json_tokenizer(**changes):
    """A byte-level BPE tokenizer.json with some values changed; "model.x" is x in the model."""
    values = json.loads(train_bpe("bpe:300", [TEXT]).file_bytes)
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (values[group] if group else values)[key] = value
    return HuggingFaceTokenizer("huggingface:tokenizer.json", json.dumps(values).encode(), 0, 1)


def pieces(**options):
    return SentencePieceTokenizer("sentencepiece:x.model", sentencepiece_model(**options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: json_tokenizer(normalizer={"type": "NFC"}), r"normalizes text \(NFC\)"),
        (lambda: json_tokenizer(pre_tokenizer={"type": "Whitespace"}), "cuts a text by Whitespace"),
        (lambda: json_tokenizer(pre_tokenizer__use_regex=False), "other options than GPT-2's"),
        (lambda: json_tokenizer(pre_tokenizer__add_prefix_space=True), "other options than GPT-2's"),
        (lambda: json_tokenizer(model__ignore_merges=True), "has the option ignore_merges=True"),
        (lambda: pieces(), "has no bytes for unknown characters"),
        (lambda: pieces(vocab_size=400, byte_fallback=True), r"normalizes text \(nmt_nfkc"),
        (
            lambda: pieces(vocab_size=400, model_type="unigram", **LLAMA, hard_vocab_limit=False),
            "of another kind",
        ),
        (lambda: pieces(eos_id=-1), "has no EOS"),
    ],
)
def test_tokenizers_that_llama_cpp_splits_otherwise_are_refused(make, message):
    with pytest.raises(
        UserError, match=f"^(huggingface:tokenizer.json|sentencepiece:x.model): .*{message}.*--format=hf"
    ):
        vocabulary(make(), 400)


def test_vocabulary_names_every_id():
    words = vocabulary(TOKENIZERS["bpe"](), 303)
    tokens = library.Tokenizer.from_str(TOKENIZERS["bpe"]().file_bytes.decode())
    assert words.tokens == [*(tokens.id_to_token(i) for i in range(300)), "[PAD300]", "[PAD301]", "[PAD302]"]
    assert words.types == [3, 3, *[1] * 298, 5, 5, 5]
    first, second = words.merges[0].split(" ")
    assert words.tokens[258] == first + second


def test_a_chat_template_comes_along(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    run_of(tmp_path / "run", TOKENIZERS["bpe"](), vocab_size=300)
    folder = tmp_path / "run" / TOKENIZER
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the settings"}))
    ours.export_run(tmp_path / "run", tmp_path / "1.gguf", "f32")
    (folder / "chat_template.jinja").write_text("from its file")
    ours.export_run(tmp_path / "run", tmp_path / "2.gguf", "f32")
    found = [read(tmp_path / f"{i}.gguf")[0]["tokenizer.chat_template"] for i in (1, 2)]
    assert found == ["from the settings", "from its file"]
    assert open_run(tmp_path / "run")[0].model == tiny_model(vocab_size=300)


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(tmp_path):
    run_of(
        tmp_path / "run", TOKENIZERS["bpe"](), vocab_size=300, width=32, num_repeats=2, sharing="immediate"
    )
    flags = ["--format=gguf", "--type=q8_0", "--mixed", f"--out={tmp_path}/out.gguf"]
    result = command("experiments.export", f"--workdir={tmp_path}/run", *flags)
    assert result.returncode == 0, result.stderr
    size = (tmp_path / "out.gguf").stat().st_size / 1e6
    first, shared, mixed, *parity = result.stdout.splitlines()
    assert first == f"exported 4 layers in q8_0, {size:.1f} MB; tokenizer: bpe:300; see {tmp_path}/out.gguf"
    assert shared.startswith("2 shared blocks were written out as 4 layers")
    assert mixed == "in f16, as q8_0 does not fit their rows: 4 tensors (blk.0.attn_output.weight, ...)"
    if llama_cpp.installed():
        assert [line.split(" ")[:3] for line in parity] == [
            ["parity:", "logits", "of"],
            ["parity:", "the", "same"],
        ]
    else:
        assert parity == [f"parity: not checked, as llama.cpp is not installed ({llama_cpp.INSTALL})"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out: missing; name what to make, such as --out=exported"),
        (["--format=gguf"], "--out: missing; name what to make, such as --out=first.gguf"),
        (["--out=x", "--type=q8_0"], "--type=q8_0: --format=hf holds f32, bf16, f16; use one of these, or"),
        (["--out=x", "--format=gguf"], "no run found"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line(tmp_path, flags, message):
    result = command("experiments.export", f"--workdir={tmp_path}", *flags)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert message in result.stderr


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpe", "bytes", "sentencepiece"])
def test_a_file_talks_as_its_run_does(tmp_path, name):
    """The same replies from llama.cpp and from our own decoding, with a history."""
    run_of(tmp_path / "run", TOKENIZERS[name](), vocab_size=400, width=32)
    (tmp_path / "run" / TOKENIZER / "chat_template.jinja").write_text(chat.TEMPLATE)
    out = tmp_path / "out.gguf"
    exported = command("experiments.export", f"--workdir={tmp_path}/run", "--format=gguf", f"--out={out}")
    assert exported.returncode == 0, exported.stderr
    flags = ["--say=One day, Lily went to the park.", "--say=é 中 🙂!", "--system=Be kind."]
    flags += ["--max_new_tokens=12", "--context=300"]
    ours, theirs = (
        command("experiments.chat", *flags, where) for where in (f"--workdir={tmp_path}/run", f"--gguf={out}")
    )
    assert (theirs.returncode, theirs.stderr) == (0, "")
    assert ours.stdout == theirs.stdout
    assert ours.stdout.count("you> ") == 2
    assert len(ours.stdout) > len("you> One day, Lily went to the park.\nyou> é 中 🙂!\n")
    asked = [{"question_id": 1, "turns": ["Hi", "And?"]}, {"question_id": 2, "turns": ["Hi"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    files = [f"--questions={tmp_path}/q.jsonl", f"--answers={tmp_path}/a.jsonl", "--max_new_tokens=5"]
    answered = command("experiments.chat", f"--gguf={out}", *files)
    assert answered.stdout.endswith(f"2 answers in the format mt_bench; see {tmp_path}/a.jsonl\n")


@needs_llama_cpp
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir: missing; name a run, such as --workdir=runs/phone, or a file with --gguf"),
        (["--gguf=x.gguf", "--workdir=x"], "--gguf: cannot be combined with --workdir"),
        (["--gguf=x.gguf", "--temperature=1"], "--temperature: --gguf always takes the most probable token"),
        (["--gguf=nowhere.gguf"], "--gguf=nowhere.gguf: there is no such file"),
        (["--gguf=README.md"], "README.md: llama.cpp cannot load it"),
    ],
    ids=str,
)
def test_files_that_cannot_talk_are_refused(flags, message):
    result = command("experiments.chat", "--say=hi", *flags)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert message in result.stderr


def trained_run(folder):
    """Trains a run with shared blocks on the bundled text, and exports it; the paths of both."""
    tiny = {"model.vocab_size": 512, "data.tokenizer": "bpe:512", "data.sequence_length": 64}
    tiny |= {"model.depth": 2, "model.width": 64, "model.num_heads": 4, "model.sharing": "immediate"}
    tiny |= {"model.num_repeats": 2, "train.steps": 150, "train.batch_size": 8, "train.eval_every": 150}
    config = [f"--config.{name}={value}" for name, value in tiny.items()]
    config += [f"--config.data.cache_dir={folder}/cache", "--config.train.eval_rows=8"]
    run, file = folder / "run", folder / "first.gguf"
    trained = command("experiments.train", f"--workdir={run}", *config)
    assert trained.returncode == 0, trained.stderr
    exported = command("experiments.export", f"--workdir={run}", "--format=gguf", f"--out={file}")
    assert exported.returncode == 0, exported.stderr
    return run, file


@needs_llama_cpp
@pytest.mark.slow
def test_a_trained_run_answers_in_llama_cpp(tmp_path):
    """As in docs/howto/gguf.md."""
    run, file = trained_run(tmp_path)
    flags = ["--prompt=The list of", "--max_new_tokens=40", "--print_ids"]
    generated = command("experiments.generate", f"--workdir={run}", *flags)
    ids = [int(word) for word in generated.stdout.split(",")]
    with llama_cpp.Model(file, context=64) as there:
        prompt = there.tokenize("The list of")
        assert prompt + there.greedy(prompt, len(ids) - len(prompt)) == ids
