"""Tokenizers: ids against the libraries themselves, and one clear error for each kind of bad input."""

import io
import json
import random
import sys

import pytest
import sentencepiece
import tokenizers as library

from mobilellm_jax.data import tokenizers
from mobilellm_jax.data.tokenizers import of_spec, open_tokenizer, pieces, train_bpe
from mobilellm_jax.errors import UserError

UNICODE = "Grüße, 世界! 👩‍🚀\r\n\ttabs  and   spaces \x01 e\u0301"
_random = random.Random(0)
WORDS = ["".join(_random.choices("abcdefgh", k=_random.randint(1, 7))) for _ in range(300)]


def text_of(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + rng.choice(["", "", ",", ".\n", "  "]) for _ in range(words))


def sentencepiece_model(**options: object) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 120, "model_type": "bpe", "minloglevel": 2, "byte_fallback": False, **options}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text_of(2000).splitlines()), model_writer=model, num_threads=1, **settings
    )
    return model.getvalue()


def test_missing_sentencepiece_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.model").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"data.tokenizer: .*needs sentencepiece: python -m pip install"):
        open_tokenizer(f"sentencepiece:{tmp_path}/a.model")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """SentencePiece models: like LLaMA's, the trainer's defaults, without BOS, without the space in front."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    keep = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    options = {
        "llama": {**keep, "byte_fallback": True, "vocab_size": 400},
        "default": {},
        "no_bos": {"bos_id": -1},
        "no_prefix": {**keep, "add_dummy_prefix": False},
    }
    for name, settings in options.items():
        (folder / f"{name}.model").write_bytes(sentencepiece_model(**settings))
    return folder


@pytest.fixture
def hugging_face(tmp_path):
    """A tokenizer.json with words, a special token in the middle of the ids, truncation and a template."""
    vocab = {"a": 0, "b": 1, "<s>": 2, "c": 3, "</s>": 4, "[PAD]": 5}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=5, pad_token="[PAD]", length=4)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_bytes():
    tokenizer = open_tokenizer("bytes")
    assert tokenizer is not None
    assert tokenizer.encode_batch(["aé", ""]) == [[97, 195, 169], []]
    assert tokenizer.decode([256, 97, 195, 169, 257, 300, -1]) == "aé"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)


def test_bpe_learns_the_most_frequent_pairs_first():
    # "ab" 4 times, then "abc" 3 times; "x" and "y" are together only once
    tokenizer = train_bpe("bpe:300", ["abc abc", "abc xy ab"])
    texts = ["ab", "abc", "xy"]
    assert [len(ids) for ids in tokenizer.encode_batch(texts)] == [1, 1, 2]
    assert tokenizer.vocab_size == 258 + 2  # no other pair occurs twice
    small = train_bpe("bpe:259", ["abc abc", "abc xy ab"])
    assert small.vocab_size == 259
    assert [len(ids) for ids in small.encode_batch(texts)] == [1, 2, 2]


def test_bpe_takes_any_text_back_and_is_the_same_every_time():
    tokenizer = train_bpe("bpe:400", [text_of(500), text_of(500, seed=1)])
    again = train_bpe("bpe:400", [text_of(500), text_of(500, seed=1)])
    assert tokenizer.file_bytes == again.file_bytes
    assert tokenizer.sha256 == again.sha256
    for text in (UNICODE, text_of(50), "", "".join(map(chr, range(1, 2000)))):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, 10_000]) == text


def test_bpe_does_not_take_text_for_special_tokens():
    tokenizer = train_bpe("bpe:258", ["a"])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    text = "ends <eos> here <bos>"
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids) == len(text)
    assert min(ids) > 1
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["llama", "default", "no_bos", "no_prefix"])
def test_sentencepiece_is_the_library(models, name):
    path = models / f"{name}.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = open_tokenizer(f"sentencepiece:{path}")
    assert tokenizer is not None
    texts = [text_of(50, seed) for seed in range(20)] + ["", " ", UNICODE]
    ids = tokenizer.encode_batch(texts)
    assert ids == [reference.encode(text) for text in texts]
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.bos_id == (None if name == "no_bos" else 1)
    assert tokenizer.eos_id == 2
    assert tokenizer.decode([2, *ids[0], 2, 10_000, -1]) == reference.decode(ids[0])
    assert tokenizer.spec == f"sentencepiece:{name}.model"


def test_hugging_face_ignores_truncation_padding_and_templates(hugging_face):
    tokenizer = open_tokenizer(f"huggingface:{hugging_face}")
    assert tokenizer is not None
    assert tokenizer.encode_batch(["a b c b", "c"]) == [[0, 1, 3, 1], [3]]
    assert 2 not in tokenizer.encode_batch(["a<s>b"])[0]
    assert tokenizer.decode([2, 0, 3, 4, 77]) == "a c"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (6, 2, 4)


@pytest.mark.parametrize(
    ("config", "bos_id", "eos_id"),
    [
        ({"bos_token": "</s>", "eos_token": {"content": "<s>", "lstrip": False}}, 4, 2),
        ({"bos_token": None, "eos_token": "</s>"}, None, 4),
        ({}, None, None),
    ],
)
def test_hugging_face_special_tokens_come_from_the_config_beside(hugging_face, config, bos_id, eos_id):
    plain = open_tokenizer(f"huggingface:{hugging_face}")
    hugging_face.with_name("tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(f"huggingface:{hugging_face}")
    assert plain is not None
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)
    assert tokenizer.sha256 != plain.sha256


@pytest.mark.parametrize("name", ["llama", "default", "no_prefix", "bpe", "bytes"])
@pytest.mark.parametrize("size", [60, 200])
def test_ids_of_pieces_are_those_of_the_whole(models, name, size):
    if name == "bpe":
        tokenizer = train_bpe("bpe:400", [text_of(500)])
    else:
        tokenizer = open_tokenizer(name if name == "bytes" else f"sentencepiece:{models / name}.model")
    assert tokenizer is not None
    drop_space = tokenizers.adds_space(tokenizer)
    assert drop_space == (name in ("llama", "default"))
    text = text_of(400, seed=3)
    cut = list(pieces(text, drop_space, size))
    assert len(cut) > 5
    assert max(map(len, cut)) <= 2 * size
    joined = [i for ids in tokenizer.encode_batch(cut) for i in ids]
    assert [joined] == tokenizer.encode_batch([text])


@pytest.mark.parametrize("name", ["llama", "default", "no_prefix"])
def test_text_without_spaces_gains_none_where_it_is_cut(models, name):
    """One space at the start, the model's own, and one in the text."""
    tokenizer = open_tokenizer(f"sentencepiece:{models / name}.model")
    assert tokenizer is not None
    text = "abcdefgh" * 60 + "\n" + "hgfedcba" * 60 + " " + "abab" * 90
    cut = list(pieces(text, tokenizers.adds_space(tokenizer), 64))
    joined = [i for ids in tokenizer.encode_batch(cut) for i in ids]
    whole = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(joined) == tokenizer.decode(whole)
    if name != "no_prefix":  # that one is cut anywhere, so that tokens across the cut are lost
        assert joined == whole


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 1000, "x  " * 300, "世界" * 300, " " * 500, text_of(300)]
)
def test_pieces_lose_nothing(text):
    cut = list(pieces(text, size=64))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 128
    assert min(map(len, cut[:-1]), default=64) >= 64


@pytest.mark.parametrize("size", ["257", "0", "-300", "1e3", "", "many", "²"])
def test_bad_bpe_size(size):
    with pytest.raises(UserError, match=rf"^data\.tokenizer: 'bpe:{size}' is not valid.* at least 258"):
        of_spec(f"bpe:{size}")


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize(
    "content", [None, b"", b"not a tokenizer", b'{"version": "1.0"}', b"\xff\xfe\0", "folder"]
)
def test_bad_tokenizer_file(tmp_path, kind, content):
    path = tmp_path / "file"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    reason = {"sentencepiece": "not a SentencePiece model", "huggingface": "not a tokenizer.json"}[kind]
    if content in (None, "folder"):
        reason = f"cannot read {path}: {'No such file or directory' if content is None else 'Is a directory'}"
    with pytest.raises(UserError, match=rf"^data\.tokenizer: '{kind}:{path}': {reason}"):
        open_tokenizer(f"{kind}:{path}")


@pytest.mark.parametrize("config", ["[]", "{"])
def test_bad_tokenizer_config(hugging_face, config):
    hugging_face.with_name("tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=r"^data\.tokenizer: 'huggingface:"):
        open_tokenizer(f"huggingface:{hugging_face}")
