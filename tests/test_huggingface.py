"""Hugging Face checkpoints: weights in, weights out, and clear words for what is neither. No PyTorch here."""

import hashlib
import http.server
import json
import os
import re
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers
from commands import command
from conftest import SHARING, apply, assert_trees_close, random_params, tiny_config, tiny_model

from configs import base
from mobilellm_jax.config import to_dict
from mobilellm_jax.data import prepare, save_tokenizer
from mobilellm_jax.data.tokenizers import BytesTokenizer, train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import huggingface
from mobilellm_jax.formats.huggingface_config import check_exportable, model_fields, read_object
from mobilellm_jax.formats.huggingface_weights import INDEX, WEIGHTS, read_params, write_params
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.runs.directory import IMPORTED, TOKENIZER, claim_workdir, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.storage.sealed import seal, unseal

STORIES = Path(__file__).parents[2] / "shared/data/weights/stories260K"
HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 9,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def random_tensors(hf, dtype=np.float32):
    """Returns the tensors of a Llama by its own names, in the order of its layers."""
    rng = np.random.default_rng(2)
    D, F, H = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    queries, keys = H * hf["num_attention_heads"], H * hf["num_key_value_heads"]
    shapes = {"model.embed_tokens": (hf["vocab_size"], D), "model.norm": (D,)}
    if not hf["tie_word_embeddings"]:
        shapes["lm_head"] = (hf["vocab_size"], D)
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm": (D,), f"{layer}.post_attention_layernorm": (D,)}
        shapes |= {f"{layer}.self_attn.q_proj": (queries, D), f"{layer}.self_attn.o_proj": (D, queries)}
        shapes |= {f"{layer}.self_attn.{x}_proj": (keys, D) for x in "kv"}
        shapes |= {f"{layer}.mlp.{x}_proj": (F, D) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (D, F)}
    return {f"{name}.weight": rng.uniform(-0.5, 0.5, shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, hf, tensors, shards=0):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    if not shards:
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)
        return folder
    places = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "hf", HF, random_tensors(HF))


def import_(folder, workdir, *how):
    return huggingface.import_run(folder, workdir, base.get_config(), *how)


# --- an independent Llama -------------------------------------------------------------------------------


def numpy_logits(hf, tensors, tokens):
    """A Llama in float64 on the tensors of the file: weights are [out, in], heads are rows of them."""
    w = {name.removesuffix(".weight"): tensor.astype(np.float64) for name, tensor in tensors.items()}
    N, K, H = hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"]
    T = len(tokens)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + hf["rms_norm_eps"]) * w[name]

    def rotate(x):  # [heads, T, H]
        angle = np.arange(T)[:, None] * hf["rope_theta"] ** (-np.arange(0, H, 2) / H)
        cos, sin = np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)
        return x * cos + np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], -1) * sin

    def heads(x, count):
        return x.reshape(T, count, H).transpose(1, 0, 2)

    x = w["model.embed_tokens"][tokens]
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            heads(y @ w[f"{layer}.self_attn.{name}_proj"].T, n) for name, n in (("q", N), ("k", K), ("v", K))
        )
        k, v = (np.repeat(z, N // K, axis=0) for z in (rotate(k), v))
        scores = rotate(q) @ k.transpose(0, 2, 1) / np.sqrt(H)
        scores = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
        attended = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + attended.transpose(1, 0, 2).reshape(T, N * H) @ w[f"{layer}.self_attn.o_proj"].T
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (y @ w[f"{layer}.mlp.{name}_proj"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}.mlp.down_proj"].T
    head = w["model.embed_tokens"] if hf["tie_word_embeddings"] else w["lm_head"]
    return norm(x, "model.norm") @ head.T


@pytest.mark.parametrize(
    ("overrides", "dtype", "shards"),
    [
        ({}, np.float32, 0),
        ({"tie_word_embeddings": False}, ml_dtypes.bfloat16, 3),
        (
            {"num_key_value_heads": 1, "rope_theta": None, "rope_parameters": {"rope_theta": 500.0}},
            np.float16,
            2,
        ),
    ],
    ids=["float32", "untied bfloat16 in shards", "float16 in shards, newer rope field"],
)
def test_logits_of_an_imported_checkpoint_equal_numpy(tmp_path, overrides, dtype, shards):
    hf = {**HF, **overrides}
    tensors = random_tensors(hf, dtype)
    folder = write_folder(tmp_path / "hf", hf, tensors, shards)
    import_(folder, tmp_path / "run")
    config, params = open_run(tmp_path / "run")
    assert ("head" in params) is not hf["tie_word_embeddings"]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    tokens = np.random.default_rng(3).integers(0, 48, 9)
    expected = numpy_logits({**hf, "rope_theta": 500.0}, tensors, tokens)
    actual = apply(params, tokens[None].astype(np.int32), config.model)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")
def test_stories260k_says_what_it_said_elsewhere(tmp_path):
    import_(STORIES, tmp_path / "run")
    config, params = open_run(tmp_path / "run")
    reference = json.loads((STORIES / "reference.json").read_text())
    with np.load(STORIES / "reference_logits.npz") as file:
        ids, logits_TV = file["ids"], file["logits"]
    actual = apply(params, ids[None], config.model)[0]
    np.testing.assert_allclose(actual, logits_TV, rtol=0, atol=1e-4 * np.abs(logits_TV).max())
    # Greedy decoding from BOS gives these ids if and only if each is the best after all before it.
    greedy = np.array(reference["greedy_ids"], np.int32)
    assert greedy.shape == (256,)
    best = np.argmax(apply(params, greedy[None], config.model)[0], axis=-1)
    assert best[:-1].tolist() == greedy[1:].tolist()
    assert greedy[0] == read_object(tmp_path / "run" / IMPORTED)["config"]["bos_token_id"]
    generator = Generator(params, config.model, Sampling(temperature=0.0, top_k=0, top_p=1.0), context=256)
    steps = generator.start([greedy[:1].tolist()], None, None, 0)
    assert [token for (token,) in steps] == greedy[1:].tolist()


# --- round trips ----------------------------------------------------------------------------------------


def read_tensors(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_is_exact(tmp_path, tied):
    hf = {**HF, "tie_word_embeddings": tied, "bos_token_id": 7, "eos_token_id": [8, 9]}
    tensors = random_tensors(hf)
    write_folder(tmp_path / "hf", hf, tensors)
    import_(tmp_path / "hf", tmp_path / "run")
    huggingface.export_run(tmp_path / "run", tmp_path / "out", "float32")
    there = read_tensors(tmp_path / "out")
    assert there.keys() == tensors.keys()
    assert all(np.array_equal(there[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in hf} == hf
    assert model_fields(written) == model_fields(hf)


@pytest.mark.parametrize(
    ("dtype", "kind", "name"), [("bfloat16", ml_dtypes.bfloat16, "bf16"), ("float16", np.float16, "f16")]
)
def test_other_dtypes_round_once(tmp_path, dtype, kind, name):
    m = tiny_model()
    params = random_params(m)
    write_params(tmp_path / WEIGHTS, params, m, dtype)
    actual = read_params(tmp_path, m, m.plan)
    rounded = jax.tree.map(lambda leaf: leaf.astype(kind).astype(np.float32), params)
    assert_trees_close(actual, rounded, tolerance=0)
    params["blocks"]["ffn"]["up"][1, 2, 3] = -3.4e38 if dtype == "bfloat16" else -1e5
    with pytest.raises(
        UserError, match=rf"--type={name}: model\.layers\.1\.mlp\.up_proj\.weight has weights"
    ):
        write_params(tmp_path / WEIGHTS, params, m, dtype)


def make_run(workdir, config, params, tokenizer=None):
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(3, {"params": params}, None)
    checkpoints.close()
    if tokenizer is not None:
        save_tokenizer(tokenizer, workdir / TOKENIZER)


@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_shared_blocks_are_written_out_and_folded_back(tmp_path, sharing):
    m = tiny_model(depth=2, **sharing)
    params = random_params(m)
    write_params(tmp_path / WEIGHTS, params, m, "float32")
    hf = {**HF, "num_hidden_layers": m.effective_depth}
    flag = {"sharing": sharing["sharing"], "num_repeats": sharing.get("num_repeats", 1)}
    folded = {**to_dict(tiny_config())["model"], **model_fields(hf, **flag), "rope_base": m.rope_base}
    assert type(m)(**folded) == m
    assert_trees_close(read_params(tmp_path, m, m.plan), params, tolerance=0)
    expanded = type(m)(**{**folded, **model_fields(hf), "rope_base": m.rope_base})
    assert (expanded.depth, expanded.sharing) == (m.effective_depth, "none")
    tokens_BT = np.arange(18, dtype=np.int32).reshape(2, 9)
    actual = apply(read_params(tmp_path, expanded, expanded.plan), tokens_BT, expanded)
    np.testing.assert_allclose(actual, apply(params, tokens_BT, m), rtol=1e-5, atol=1e-5)
    if sharing["sharing"] == "none":
        return
    tensors = read_tensors(tmp_path)
    last = f"model.layers.{m.effective_depth - 1}.mlp.down_proj.weight"
    tensors[last][3, 4] = np.nextafter(tensors[last][3, 4], np.float32(9))
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        UserError, match=rf"{last} differs from model\.layers\.\d\.mlp\.down_proj.* are one block"
    ):
        read_params(tmp_path, m, m.plan)


def test_the_official_options_share_embedding_and_layers(tmp_path):
    official = {"model_type": "mobilellm", "architectures": ["MobileLLMForCausalLM"]}
    hf = {**HF, **official, "tie_word_embeddings": False, "share_embedding": True, "layer_sharing": True}
    tensors = random_tensors({**hf, "tie_word_embeddings": True})
    write_folder(tmp_path / "hf", hf, tensors)
    import_(tmp_path / "hf", tmp_path / "run")
    config, params = open_run(tmp_path / "run")
    assert "head" not in params
    assert config.model.plan == (0, 0, 1, 1)
    tokens = np.arange(9)
    twice = {**HF, "num_hidden_layers": 4}
    copies = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    for layer in range(4):
        for name, tensor in tensors.items():
            if f".layers.{layer // 2}." in name:
                copies[name.replace(f".layers.{layer // 2}.", f".layers.{layer}.")] = tensor
    actual = apply(params, tokens[None].astype(np.int32), config.model)[0]
    np.testing.assert_allclose(actual, numpy_logits(twice, copies, tokens), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"--sharing=reverse: layer_sharing in config\.json is 'immediate'"):
        model_fields(hf, "reverse", 2)


@pytest.mark.parametrize("parameterization", ["mup", "completep"])
@pytest.mark.parametrize("tied", [True, False])
def test_multipliers_go_into_the_weights(tmp_path, parameterization, tied):
    # 24 / 7 and 4 / 3 are no powers of two.
    shape = {
        "base_width": 7,
        "base_depth": 3,
        "sharing": "reverse",
        "num_repeats": 2,
        "share_embedding": tied,
    }
    m = tiny_model(parameterization=parameterization, **shape)
    params = random_params(m)
    write_params(tmp_path / WEIGHTS, params, m, "float32")
    standard = tiny_model(**shape)
    tokens_BT = np.arange(18, dtype=np.int32).reshape(2, 9)
    actual = apply(read_params(tmp_path, standard, standard.plan), tokens_BT, standard)
    expected = apply(params, tokens_BT, m)
    # Rounding of the folded weights: up to 1.6e-6 of the largest logit on an AMD EPYC (AVX-512).
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * np.abs(expected).max())
    assert np.abs(expected - apply(params, tokens_BT, standard)).max() > 0.1


def test_uses_that_differ_are_written_out(tmp_path):
    extras = {"loop_gains": True, "loop_rank": 2, "loop_scale": "1 0.5 0.25", "loop_targets": "value|gate"}
    fields = {"model.sharing": "0 1 0 0", "model.width": 28, "model.head_dim": 10}
    config = tiny_config(**fields, **{f"model.{name}": value for name, value in extras.items()})
    make_run(tmp_path / "run", config, params := random_params(config.model))
    huggingface.export_run(tmp_path / "run", tmp_path / "out", "float32")
    hf, tokens = json.loads((tmp_path / "out/config.json").read_text()), np.arange(9, dtype=np.int32)
    expected = numpy_logits(hf, read_tensors(tmp_path / "out"), tokens)
    np.testing.assert_allclose(apply(params, tokens[None], config.model)[0], expected, rtol=1e-4, atol=1e-4)
    norm = tiny_config(**fields, **{"model.loop_norm": True})
    make_run(tmp_path / "norm", norm, random_params(norm.model))
    with pytest.raises(
        UserError, match=r"^--format=hf: model\.loop_norm=True changes the state between blocks"
    ):
        huggingface.export_run(tmp_path / "norm", tmp_path / "refused", "float32")


# --- the tokenizer --------------------------------------------------------------------------------------

TEXT = "One day, Lily went  to the park.\n\tShe saw a big é 中 🙂!"


def sentencepiece_model(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(["some words and more words", "a park and a day"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return (tmp_path / "sp.model").read_bytes()


def test_a_tokenizer_comes_along(tmp_path):
    tokenizer = train_bpe("bpe:300", [TEXT] * 3)
    hf = {**HF, "vocab_size": 300}
    folder = write_folder(tmp_path / "hf", hf, random_tensors(hf))
    (folder / "tokenizer.json").write_bytes(tokenizer.file_bytes)
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": null, "eos_token": "<eos>", "model_max_length": 9}'
    )
    workdir = tmp_path / "run"
    import_(folder, workdir)
    there = open_tokenizer(workdir)
    assert (there.bos_id, there.eos_id) == (None, 1)
    assert there.encode_batch([TEXT]) == tokenizer.encode_batch([TEXT])
    spec = open_run(workdir)[0].data.tokenizer
    assert spec == f"huggingface:{workdir}/tokenizer/tokenizer.json"
    assert Path(spec.partition(":")[2]).is_file()
    huggingface.export_run(workdir, tmp_path / "out", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "card.json").exists()


def test_a_sentencepiece_tokenizer_comes_along(tmp_path):
    content = sentencepiece_model(tmp_path)
    hf = {**HF, "vocab_size": 300}
    folder = write_folder(tmp_path / "hf", hf, random_tensors(hf))
    (folder / "tokenizer.model").write_bytes(content)
    import_(folder, tmp_path / "run")
    assert open_tokenizer(tmp_path / "run").file_bytes == content
    huggingface.export_run(tmp_path / "run", tmp_path / "out", "float32")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == content
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (written["bos_token"], written["eos_token"]) == ("<s>", "</s>")


def test_a_trained_bpe_and_bytes_get_a_tokenizer_json(tmp_path):
    for i, tokenizer in enumerate([train_bpe("bpe:300", [TEXT] * 3), BytesTokenizer()]):
        config = tiny_config(**{"model.vocab_size": 300})
        make_run(tmp_path / f"run{i}", config, random_params(config.model), tokenizer)
        huggingface.export_run(tmp_path / f"run{i}", tmp_path / f"out{i}", "float32")
        there = tokenizers.Tokenizer.from_file(str(tmp_path / f"out{i}" / "tokenizer.json"))
        ids = there.encode(TEXT, add_special_tokens=False).ids
        assert ids == tokenizer.encode_batch([TEXT])[0]
        assert there.decode(ids) == TEXT
        names = json.loads((tmp_path / f"out{i}" / "tokenizer_config.json").read_text())
        assert there.token_to_id(names["bos_token"]) == tokenizer.bos_id
        assert there.token_to_id(names["eos_token"]) == tokenizer.eos_id
        hf = json.loads((tmp_path / f"out{i}" / "config.json").read_text())
        assert (hf["bos_token_id"], hf["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder, tmp_path):
    (folder / "tokenizer.json").write_bytes(train_bpe("bpe:300", [TEXT] * 3).file_bytes)
    with pytest.raises(
        UserError, match=r"tokenizer\.json: has ids up to \d+, but config\.json has vocab_size=48"
    ):
        import_(folder, tmp_path / "run")


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2' .*valid: 'llama' with LlamaForCausalLM"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        ({"attention_bias": True}, "attention_bias=True is not supported; only False is"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported; only null is"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*only rope_type 'default'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e2}}, "rope_parameters="),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e2}}}, "rope_parameters="),
        ({"rope_parameters": {"rope_theta": 5e2, "partial_rotary_factor": 0.5}}, "rope_parameters="),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            r"rope_theta has conflicting values: 500\.0 and 1000000\.0",
        ),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' is not valid; expected a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None is not valid"),
        ({"hidden_size": 0}, "hidden_size=0 is not valid; expected an integer of at least 1"),
        ({"vocab_size": None}, "vocab_size=None is not valid"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers=2\.0 is not valid"),
        (
            {"head_dim": None, "num_attention_heads": 5},
            "num_attention_heads=5 does not divide hidden_size=24",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is not valid; expected true or false"),
        ({"head_dim": 9}, "head_dim: 9 is odd"),
        ({"num_key_value_heads": 3}, "num_kv_heads: 3 does not divide"),
        ({"max_position_embeddings": None}, "max_position_embeddings=None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_is_another_model_is_refused(tmp_path, changes, message):
    folder = write_folder(tmp_path / "hf", {**HF, **changes}, random_tensors(HF))
    with pytest.raises(UserError, match=message):
        import_(folder, tmp_path / "run")
    assert os.listdir(tmp_path) == ["hf"]  # nothing is left behind


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"sharing": "immediate", "num_repeats": 3}, "num_repeats=3: does not divide num_hidden_layers=4"),
        ({"sharing": "0 1 0"}, "'0 1 0': the plan has 3 layers, but config.json has num_hidden_layers=4"),
        ({"sharing": "imediate", "num_repeats": 2}, "unknown strategy 'imediate'; did you mean immediate"),
        ({"num_repeats": 2}, "num_repeats: 2 has no meaning"),
        ({"sharing": "0 2 0 2"}, "must use every block"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(flag, message):
    with pytest.raises(UserError, match=message):
        model_fields({**HF, "num_hidden_layers": 4}, **flag)


def change(**tensors):
    """Returns a change to a folder: these tensors in place of what was there; None removes one."""

    def apply_to(folder):
        there = read_tensors(folder) | {f"{name}.weight": value for name, value in tensors.items()}
        there = {name: value for name, value in there.items() if value is not None}
        safetensors.numpy.save_file(there, folder / WEIGHTS)

    return apply_to


def cut(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def use_pickle(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def use_index(text):
    def apply_to(folder):
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(text)

    return apply_to


def weight_map(file):
    return json.dumps({"weight_map": dict.fromkeys(random_tensors(HF), file)})


QUERY, NORM = "model.layers.1.self_attn.q_proj", "model.norm"
FREQUENCY = 500.0 ** -(np.arange(0, 10, 2) / 10)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(**{QUERY: None}), rf"{QUERY}\.weight is missing"),
        (change(**{QUERY: None, NORM: None}), r"model\.norm\.weight, .*q_proj\.weight are missing"),
        (
            change(**{"model.layers.2.mlp.up_proj": np.ones((2, 2))}),
            r"layers\.2\.mlp\.up_proj\.weight is not part",
        ),
        (
            change(**{"model.layers.0.self_attn.q_norm": np.ones(10)}),
            r"q_norm\.weight is not part of a Llama",
        ),
        (
            change(**{QUERY: np.ones((24, 40), np.float32)}),
            r"q_proj.* has shape \(24, 40\), but \(40, 24\)",
        ),
        (
            change(**{NORM: np.ones(24)}),
            r"model\.norm\.weight is of type F64; expected one of F32, BF16, F16",
        ),
        (change(lm_head=np.ones((48, 24), np.float32)), r"lm_head\.weight differs from the embedding"),
        (cut, r"model\.safetensors: truncated or not a safetensors file"),
        (
            use_pickle,
            r"neither .* \(found pytorch_model\.bin\); only safetensors are read.*save_pretrained",
        ),
        (use_index("{"), "cannot be read as JSON"),
        (use_index("[]"), "expected a JSON object"),
        (use_index("{}"), "weight_map is missing"),
        (
            use_index(weight_map("../a.safetensors")),
            r"'\.\./a\.safetensors' is not the name of a safetensors file",
        ),
        (use_index(weight_map("/a.safetensors")), "is not the name of"),
        (use_index(weight_map("a.bin")), r"'a\.bin' is not the name of a safetensors file"),
        (use_index(weight_map("b.safetensors")), r"b\.safetensors: is missing, but listed in"),
        (
            use_index(json.dumps({"weight_map": {"x": "a.safetensors"}})),
            r"contains .*, which .* lists in another file",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: is missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: expected a JSON object"),
    ],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        import_(folder, tmp_path / "run")
    assert os.listdir(tmp_path) == ["hf"]


def test_what_follows_from_the_rest_may_be_there_twice(folder):
    """The head of a tied model, and frequencies, which old checkpoints have; if they agree."""
    m = tiny_model(rope_base=500.0)
    expected = read_params(folder, m, m.plan)
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = FREQUENCY.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    assert_trees_close(read_params(folder, m, m.plan), expected, tolerance=0)
    with pytest.raises(UserError, match=r"inv_freq differs from the rope_theta"):
        read_params(folder, tiny_model(rope_base=400.0), (0, 1))


def test_an_untied_model_needs_its_head(folder):
    with pytest.raises(UserError, match=r"lm_head\.weight is missing; config\.json does not tie"):
        read_params(folder, tiny_model(share_embedding=False), (0, 1))


def test_models_that_are_no_llama_are_not_exported(tmp_path):
    with pytest.raises(UserError, match=r"model\.ffn_kind: 'relu' cannot be exported as a Llama"):
        check_exportable(tiny_model(ffn_kind="relu"))
    with pytest.raises(UserError, match=r"model\.num_heads: 4 does not divide model\.width=30"):
        check_exportable(tiny_model(width=30))
    config = tiny_config(**{"model.ffn_kind": "gelu"})
    make_run(tmp_path / "run", config, random_params(config.model))
    with pytest.raises(UserError, match="'gelu'"):
        huggingface.export_run(tmp_path / "run", tmp_path / "out", "float32")
    assert os.listdir(tmp_path) == ["run"]


def test_directories_are_made_whole_and_never_written_over(folder, tmp_path):
    (tmp_path / "run").mkdir()  # empty: may be used
    import_(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"--workdir=.*run: already exists"):
        import_(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"--out=.*run: already exists"):
        huggingface.export_run(tmp_path / "run", tmp_path / "run", "float32")
    with pytest.raises(UserError, match=r"hf/config\.json: not the config of a run"):
        huggingface.export_run(tmp_path / "hf", tmp_path / "out", "float32")
    with pytest.raises(UserError, match=r"--out=.*x: cannot write there \(Not a directory\)"):
        huggingface.export_run(tmp_path / "run", tmp_path / "hf" / "config.json" / "x", "float32")
    assert sorted(os.listdir(tmp_path)) == ["hf", "run"]


@pytest.mark.parametrize("source", ["imported", "files:unknown", "tokens:unknown"])
def test_what_imported_weights_were_trained_on_is_not_known(folder, tmp_path, source):
    """Imports of earlier versions say so in two other ways."""
    config = import_(folder, tmp_path / "run")
    assert config.data.source == "imported"
    path = tmp_path / "run/config.json"
    values = unseal(json.loads(path.read_text()))
    values["data"]["source"] = source
    path.write_text(json.dumps(seal(values)))
    assert open_run(tmp_path / "run")[0].data.source == source
    with pytest.raises(
        UserError,
        match=r"data\.source: '(imported' marks weights with unknown training data|.*unknown' matches)",
    ):
        prepare(open_run(tmp_path / "run")[0].data, 1 << 16)


def test_imported_weights_are_not_trained_on(folder, tmp_path):
    import_(folder, tmp_path / "run")
    config, _ = open_run(tmp_path / "run")
    with pytest.raises(
        UserError, match="has imported weights without an optimizer state, so training cannot resume"
    ):
        claim_workdir(tmp_path / "run", config)


# --- the hub --------------------------------------------------------------------------------------------

COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the repository org/name from `folder` to `snapshot_download`, and keeps what was asked."""

    folder: Path
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/api/models/org/name/revision/"):
            siblings = [{"rfilename": path.name} for path in self.folder.iterdir()]
            return self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        if self.path.startswith(f"/api/models/org/name/tree/{COMMIT}"):
            sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
            files = [{"type": "file", "oid": "", "path": name, "size": size} for name, size in sizes.items()]
            return self.answer(json.dumps(files).encode())
        path = self.folder / self.path.rpartition("/")[2]
        if self.path.startswith(f"/org/name/resolve/{COMMIT}/") and path.is_file():
            return self.answer(path.read_bytes())
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def answer(self, content):
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def import_from_hub(folder, tmp_path):
    """Returns a function that runs the import command on a hub of its own, and what that hub was asked."""
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }

    def call(source):
        arguments = [f"--source={source}", f"--workdir={tmp_path}/run"]
        return command("experiments.import_hf", *arguments, env=environment)

    yield call, handler.asked
    server.shutdown()
    server.server_close()


def test_an_id_on_the_hub_is_downloaded(folder, tmp_path, import_from_hub):
    call, asked = import_from_hub
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody needs")
    result = call("org/name")
    assert result.returncode == 0, result.stderr
    assert re.search("^imported .*; tokenizer: none; ", result.stdout)
    config, params = open_run(tmp_path / "run")
    expected = read_params(folder, config.model, config.model.plan)
    assert_trees_close(params, expected, tolerance=0)
    assert not [path for path in asked if path.endswith(".bin")]
    result = call("org/nmae")
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (2, 1), result.stderr
    assert "--source=org/nmae: no such folder, and the hub answered: " in result.stderr


def test_another_architecture_on_the_hub_is_refused_before_its_weights_come(folder, import_from_hub):
    call, asked = import_from_hub
    (folder / "config.json").write_text(json.dumps({**HF, "model_type": "gpt2"}))
    result = call("org/name")
    assert (result.returncode, "model_type='gpt2'" in result.stderr) == (2, True), result.stderr
    assert not [path for path in asked if "safetensors" in path]
