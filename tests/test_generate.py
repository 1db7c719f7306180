"""Text piece by piece: the same logits as all at once, the same text alone and in a batch, honest draws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARING, apply, random_batch, random_params, tiny_model
from test_data_tokenizers import sentencepiece_model

from mobilellm_jax import model
from mobilellm_jax.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import generate
from mobilellm_jax.inference.generate import Generator, Sampling, TextStream
from mobilellm_jax.model.stack import unstack

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]
extend = jax.jit(model.extend, static_argnums=3)
logits = jax.jit(model.logits)


# --- the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (SHARING[3], 1e-5),
        ({"compute_dtype": "bfloat16"}, 0.05),
        *(
            pytest.param(sharing, 1e-5, marks=pytest.mark.slow)
            for sharing in SHARING
            if sharing != SHARING[3]
        ),
        pytest.param({"num_kv_heads": 1, "share_embedding": False}, 1e-5, marks=pytest.mark.slow),
        pytest.param(
            {"num_kv_heads": 4, "parameterization": "mup", "base_width": 12}, 1e-5, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_text_in_parts_has_the_logits_of_the_whole(overrides, tolerance):
    m = tiny_model(**overrides)
    stacked, (tokens_BT, _) = random_params(m), random_batch(m)
    whole_BTV, listed = apply(stacked, tokens_BT, m), unstack(stacked)
    for params, parts in itertools.product([stacked, listed], [(9,), (4, 4, 1), (1,) * 9]):
        cache = model.empty_cache(jnp.zeros(len(tokens_BT), int), 12, m)  # more room than is used
        read, start = [], 0
        for length in parts:
            x_BTD, cache = extend(params, tokens_BT[:, start : start + length], cache, m)
            read.append(logits(params, x_BTD))
            start += length
        scale = np.abs(whole_BTV).max()
        np.testing.assert_allclose(np.concatenate(read, 1) / scale, whole_BTV / scale, atol=tolerance)
        assert cache.used == 9


def test_padding_changes_nothing():
    m = tiny_model(sharing="reverse", num_repeats=2)
    params, (tokens_BT, _) = random_params(m), random_batch(m)
    whole_BTV = np.asarray(apply(params, tokens_BT, m))
    paddings = range(1, 9)  # row b begins with b + 1 slots of padding, and its token 8 - b comes later
    padded = [[47] * p + list(row[: 9 - p]) for p, row in zip(paddings, tokens_BT, strict=True)]
    cache = model.empty_cache(jnp.array(paddings), 12, m)
    x_BTD, cache = extend(params, np.array(padded, np.int32), cache, m)
    next_B = np.array([row[9 - p] for p, row in zip(paddings, tokens_BT, strict=True)])
    more_BTD, _ = extend(params, next_B[:, None], cache, m)
    read_BTV = np.concatenate([logits(params, x_BTD), logits(params, more_BTD)], axis=1)
    for p, row_TV, expected_TV in zip(paddings, read_BTV, whole_BTV, strict=True):
        np.testing.assert_allclose(row_TV[p:], expected_TV[: 10 - p], atol=1e-5 * np.abs(whole_BTV).max())


def test_the_cache_has_an_entry_for_every_layer_applied():
    m = tiny_model(sharing="0 1 0 0")
    cache = model.empty_cache(jnp.zeros(3, int), 7, m)
    assert [array.shape for layer in cache.layers for array in layer] == 4 * 2 * [(3, 2, 7, 10)]
    bfloat16 = tiny_model(compute_dtype="bfloat16")
    assert model.empty_cache(jnp.zeros(3, int), 7, bfloat16).layers[0][0].dtype == "bfloat16"


def test_a_step_of_decoding_copies_no_cache():
    m = tiny_model(sharing="immediate", num_repeats=8)
    generator = Generator(random_params(m), m, GREEDY, context=256)
    generator.start([[1] * 100, [2]], 100, None, 0)
    ((_, step),) = generator._programs.values()
    memory, size = step.memory_analysis(), 4 * 2 * m.effective_depth * 2 * 256 * 2 * 10
    assert memory.alias_size_in_bytes >= size  # updated where it stands
    assert memory.temp_size_in_bytes < size / 4


def test_a_step_of_decoding_copies_no_weights():
    m = tiny_model(width=160, num_heads=4, head_dim=40, ffn_width=1000, sharing="immediate", num_repeats=2)
    generator = Generator(random_params(m), m, GREEDY, context=16)
    generator.start([[2]], 2, None, 0)
    ((_, step),) = generator._programs.values()
    output = (
        4 * m.num_heads * m.head_dim * m.width
    )  # bytes; the others are larger, or as small as activations
    assert step.memory_analysis().temp_size_in_bytes < output


# --- prompts -------------------------------------------------------------------------------------------


def _keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def tiny(**overrides):
    m = tiny_model(**overrides)
    return random_params(m), m


def without_cache(params, m, prompt, steps):
    """Returns the most probable continuation, with the whole text read anew for every token."""
    tokens = list(prompt)
    for _ in range(steps):
        padded = np.array([tokens + [0] * (24 - len(tokens))], np.int32)  # what comes later is not seen
        tokens.append(int(np.argmax(apply(params, padded, m)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def continuations(generator, prompts, steps, eos_id=None, seed=0, place=0):
    """Returns the new tokens of each prompt, and the number of steps."""
    rows = list(generator.start(prompts, steps, eos_id, seed, place))
    return [[token for token in column if token is not None] for column in zip(*rows, strict=True)], len(rows)


@pytest.mark.parametrize("sharing", [SHARING[0], SHARING[3]], ids=str)
def test_a_batch_of_prompts_gives_what_each_gives_alone_without_a_cache(sharing):
    params, m = tiny(**sharing)
    expected = [without_cache(params, m, prompt, 12) for prompt in PROMPTS]
    generator = Generator(params, m, GREEDY, context=24)
    assert continuations(generator, PROMPTS, 12) == (expected, 12)
    assert continuations(generator, PROMPTS, None) == (expected, 12)  # 24 less the longest prompt
    assert continuations(generator, PROMPTS[:1], 12) == (expected[:1], 12)


def test_a_text_ends_with_eos():
    params, m = tiny()
    expected = [without_cache(params, m, prompt, 12) for prompt in PROMPTS]
    eos_id = expected[0][4]
    ends = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in expected]
    assert 0 < len(ends[0]) < max(map(len, ends))
    generator = Generator(params, m, GREEDY, context=24)
    assert continuations(generator, PROMPTS, 12, eos_id) == (ends, max(map(len, ends)))
    assert continuations(generator, PROMPTS[:1], 12, eos_id) == (ends[:1], len(ends[0]))  # no step too many


def test_bfloat16_matrices_are_cast_once():
    params, m = tiny(compute_dtype="bfloat16")
    generator = Generator(params, m, GREEDY, context=24)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(generator._params)}
    assert kinds == {"bfloat16", "float32"}  # norm gains
    assert continuations(generator, PROMPTS[:1], 5)[0] == [without_cache(params, m, PROMPTS[0], 5)]


def test_draws_follow_from_seed_and_place():
    params, m = tiny()
    flat = Sampling(temperature=3.0, top_k=0, top_p=1.0)
    generator = Generator(params, m, flat, context=24)
    (first, *_, last), _ = continuations(generator, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], 12, seed=3)
    assert first != last
    again, _ = continuations(generator, [PROMPTS[0], PROMPTS[2]], 12, seed=3)
    assert again[0] == first  # whatever stands beside it
    assert continuations(generator, [PROMPTS[0]], 12, seed=4)[0][0] != first
    assert continuations(generator, [PROMPTS[0]], 12, seed=3, place=2)[0][0] == last


@pytest.mark.parametrize(
    ("prompts", "most", "message"),
    [
        ([[1], []], 3, "prompt 2: is empty"),
        ([[1, 48]], 3, r"prompt 1: token 48 is not valid; expected 0 to 47"),
        ([[-1]], 3, "prompt 1: token -1 is not valid"),
        ([[1], [1] * 20], 5, r"prompt 2: its 20 tokens and max_new_tokens=5 .* context of 24"),
        ([[1] * 24], None, r"prompt 1: its 24 tokens and max_new_tokens=1"),
        ([[1]], 0, "max_new_tokens: 0 is not valid"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompts, most, message):
    params, m = tiny()
    with pytest.raises(UserError, match=message):
        Generator(params, m, GREEDY, context=24).start(prompts, most, None, 0)


# --- draws ---------------------------------------------------------------------------------------------

LOGITS_V = np.log([0.02, 0.4, 0.08, 0.25, 0.15, 0.1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.02, 0.4, 0.08, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.0004, 0.16, 0.0064, 0.0625, 0.0225, 0.01]),
        ({"top_k": 3}, [0, 0.4, 0, 0.25, 0.15, 0]),
        ({"top_k": 99}, [0.02, 0.4, 0.08, 0.25, 0.15, 0.1]),
        ({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.15, 0]),  # 0.65 is not enough
        ({"top_p": 0.64}, [0, 0.4, 0, 0.25, 0, 0]),
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.4, 0, 0.25, 0, 0]),  # 0.65 of the three's 0.8
        ({"temperature": 2.0, "top_k": 2}, [0, 0.4**0.5, 0, 0.5, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_have_the_probabilities_they_should(settings, expected):
    sampling = Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings})
    draws = 20_000
    logits_BV = jnp.broadcast_to(jnp.float32(LOGITS_V), (draws, 6))
    tokens_B, _ = jax.jit(generate.choose, static_argnums=2)(logits_BV, _keys(draws), sampling)
    found_V = np.bincount(tokens_B, minlength=6) / draws
    p_V = np.array(expected) / np.sum(expected)
    assert np.all(found_V[p_V == 0] == 0)
    assert np.all(np.abs(found_V - p_V) <= 5 * np.sqrt(p_V * (1 - p_V) / draws))


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-38, 1.2e-38, 1e-30])
def test_the_smallest_temperatures_take_the_most_probable(temperature):
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0)
    for logits_V in ([0.0, -3.0, -1.0], [5.0, 900.0, 899.9], [-7.0, -9.0, -6.9]):
        logits_BV = jnp.broadcast_to(jnp.float32(logits_V), (64, 3))
        tokens_B, _ = jax.jit(generate.choose, static_argnums=2)(logits_BV, _keys(64), sampling)
        assert set(tokens_B.tolist()) == {int(np.argmax(logits_V))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 is not valid; expected a number of at least 0"),
        ({"top_k": -1}, "top_k: -1 is not valid"),
        ({"top_p": 0.0}, "top_p: 0.0 is not valid; expected a number above 0"),
        ({"temperature": 0.0, "top_k": 5}, "temperature: 0 always .* top_k=5 .* have no effect"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings})


# --- text ----------------------------------------------------------------------------------------------

TEXT = "Grüße,  世界! 👩‍🚀\n\tand so on "


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.add(token) for token in ids), stream.finish()]


def sentencepiece_like_llama():
    options = {
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "byte_fallback": True,
    }
    return SentencePieceTokenizer("sentencepiece:x", sentencepiece_model(vocab_size=400, **options))


@pytest.mark.parametrize(
    "make",
    [BytesTokenizer, lambda: train_bpe("bpe:300", [TEXT[:8] * 3]), sentencepiece_like_llama],
    ids=["bytes", "bpe", "sentencepiece"],
)
def test_pieces_of_text_are_whole_characters_and_add_up(make):
    tokenizer = make()
    (ids,) = tokenizer.encode_batch([TEXT])
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    pieces = streamed(tokenizer, [begin, *ids, end])
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 8  # and not all at the end
    cut = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("\ufffd"))
    assert "".join(streamed(tokenizer, ids[:cut])) == tokenizer.decode(ids[:cut])


@pytest.mark.parametrize("prefix", [True, False])
def test_spaces_in_a_row_are_kept(prefix):
    """Ids that encoding never gives, of a model that removes extra spaces, but that a model may choose."""
    tokenizer = SentencePieceTokenizer("sentencepiece:x", sentencepiece_model(add_dummy_prefix=prefix))
    space, (word, *_) = tokenizer._processor.piece_to_id("\u2581"), tokenizer.encode_batch(["ab"])[0][-1:]
    for ids in ([word, space, space, word], [space, space, word, space, word], [space, word, *[space] * 5]):
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert "  " in tokenizer.decode([word, space, space, word])


def test_bytes_that_are_no_text_hold_nothing_up():
    ids = [*b"a\xffb\xe4\xb8", *b"c", 0xE4]
    assert streamed(BytesTokenizer(), ids) == ["a", "", "\ufffdb", "", "", "\ufffdc", "", "\ufffd"]
