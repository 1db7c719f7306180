"""Conversations: the template against jinja, masks against a plain loop, packing, one clear error each."""

import importlib.util
import json
import lzma

import jax
import numpy as np
import pytest
from conftest import tiny_config
from test_data_prepare import config, rows
from test_data_tokenizers import sentencepiece_model

from mobilellm_jax import data
from mobilellm_jax.data import chat
from mobilellm_jax.data.card import FORMAT_VERSION
from mobilellm_jax.data.tokenizers import BytesTokenizer, open_tokenizer, train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.directory import data_notes
from mobilellm_jax.runs.run import _floor_fields
from mobilellm_jax.training.held_out import by_document, by_position, evaluate_held_out
from mobilellm_jax.training.programs import make_programs

BOS, EOS = 256, 257


def said(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


ALARM = said(
    ("system", "You are a phone."),
    ("user", " Wake me at seven.\n"),
    ("call", {"intent": "set_alarm", "time": "07:00", "note": "ü"}),
    ("result", [{"ok": True}]),
    ("assistant", "Done."),
    ("user", "Thanks"),
    ("assistant", "A\n\n pleasure."),
)
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "unused"}
ROWS = [ALARM, ALPACA, said(("user", ""), ("assistant", "世界 {"))]


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def plain(row, eos="", bos=""):
    """The template as a person would write it."""
    if "instruction" in row:
        row = said(("user", f"{row['instruction']}\n\n{row['input']}"), ("assistant", row["output"]))
    text = ""
    for message in row["messages"]:
        content, role = message["content"], message["role"]
        content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        made = role in ("assistant", "call")
        text += f"\n<|{'assistant' if made else role}|>\n{content.strip()}{eos if made else ''}"
    return bos + text[1:]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("ask", [False, True])
def test_the_exported_template_gives_the_same_text(row, ask):
    jinja2 = pytest.importorskip("jinja2.sandbox")
    environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # as in transformers
    turns = chat.conversation_of(row)
    messages = row.get("messages", [{"role": t.role, "content": t.text} for t in turns])
    found = environment.from_string(chat.TEMPLATE).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=ask
    )
    expected = plain(row, "</s>", "<s>") + ("\n<|assistant|>\n" if ask else "")
    assert found == expected == chat.render(turns, "<s>", "</s>", ask)


def masked_bytes(row):
    """Ids of a conversation with the tokenizer `bytes`, character by character."""
    ids, made, text = [~BOS], False, plain(row, "\0")
    for place, character in enumerate(text):
        if character == "\0":
            ids.append(EOS)
            made = False
            continue
        ids += [byte if made else ~byte for byte in character.encode()]
        made = made or text[: place + 1].endswith("<|assistant|>\n")
    return ids


@pytest.mark.parametrize("row", ROWS)
def test_masks_are_those_of_a_loop_over_characters(row):
    (ids,) = chat.encode(BytesTokenizer(), [chat.conversation_of(row)])
    assert ids == masked_bytes(row)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_ids_are_those_of_the_whole_text(kind, tmp_path):
    (tmp_path / "some.model").write_bytes(sentencepiece_model())
    texts = [plain(row) for row in ROWS] * 3
    tokenizer = {
        "bytes": BytesTokenizer,
        "bpe": lambda: train_bpe("bpe:330", texts),
        "sentencepiece": lambda: open_tokenizer(f"sentencepiece:{tmp_path}/some.model"),
    }[kind]()
    several = chat.encode(tokenizer, [chat.conversation_of(row) for row in ROWS], bos=False)
    for row, ids in zip(ROWS, several, strict=True):
        pieces = plain(row, "\0").split("\0")  # transformers splits a text at its special tokens as well
        whole = [i for part in tokenizer.encode_batch(pieces) for i in [*part, tokenizer.eos_id]]
        assert [max(i, ~i) for i in ids] == whole[:-1]
        replies = "".join(chr(0) if i == tokenizer.eos_id else "" if i < 0 else "." for i in ids)
        assert replies.count("\0") == sum(t.role in chat.MADE for t in chat.conversation_of(row))


class Merging(BytesTokenizer):
    """Has one token for a newline and the letter after it, at the beginning of a text."""

    def encode_batch(self, texts):
        return [[999, *t[2:].encode()] if t[:2] == "\nD" else [*t.encode()] for t in texts]


def test_replies_keep_their_first_letter_where_a_token_spans_the_newline():
    turns = chat.conversation_of(ALARM)
    assert chat.encode(Merging(), [turns]) == chat.encode(BytesTokenizer(), [turns])


def test_prompts_are_conversations_up_to_the_next_reply():
    tokenizer = BytesTokenizer()
    turns = chat.conversation_of(ALARM)
    (ids,) = chat.encode(tokenizer, [turns])
    prompt = chat.prompt_ids(tokenizer, turns[:4], bos=True)
    reply = [*b"Done.", EOS]
    assert [max(i, ~i) for i in ids][: len(prompt) + 6] == prompt + reply
    assert ids[len(prompt) : len(prompt) + 6] == reply
    assert chat.prompt_ids(tokenizer, (), bos=False) == list(b"<|assistant|>\n")


def conversations(n):
    """Conversations of several lengths, with one that is longer than a row of 60 and one without room."""
    made = [said(("user", "u" * (i % 7)), ("assistant", "a" * (1 + i % 5))) for i in range(n)]
    made[3] = said(("user", "hi"), ("assistant", "x"), ("user", "y"), ("assistant", "z" * 60))
    made[5] = said(("user", "hi" * 40), ("assistant", "x"))
    made[8]["messages"].append({"role": "user", "content": "not learned"})
    return made


def reference_rows(several, size):
    """Packing as a person would write it."""
    found, row, counts = [], [], [0, 0]
    for conversation in several:
        ids = masked_bytes(conversation)
        kept = [n for n in range(1, min(size, len(ids)) + 1) if ids[n - 1] == EOS]
        counts[0] += bool(kept) and kept[-1] < len(ids) - ids[::-1].index(EOS)
        counts[1] += not kept
        ids = ids[: kept[-1]] if kept else []
        if len(row) + len(ids) > size:
            found.append(row + [-1] * (size - len(row)))
            row = []
        row = row + ids
    return [*found, row + [-1] * (size - len(row))], counts


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with lzma.open(tmp_path / "train.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(40))
    write(tmp_path / "valid.jsonl", conversations(101))
    sources = {
        "source": f"conversations:{tmp_path}/train.jsonl.xz",
        "valid_source": f"conversations:{tmp_path}/valid.jsonl",
    }
    return data.prepare(config(tmp_path, **sources, sequence_length=59), 258)


def test_rows_are_whole_conversations(prepared):
    expected, (cut, left_out) = reference_rows(conversations(40), 60)
    assert rows(prepared, "train") == expected
    entry = prepared.card["splits"]["train"]
    assert (entry["cut"], entry["left_out"]) == (cut, left_out) == (1, 1)
    flat = [i for row in expected for i in row]
    assert entry["targets"] == sum(i >= 0 for i in flat)
    assert entry["target_bytes"] == sum(0 <= i < 256 for i in flat)
    assert entry["padding"] == sum(row[::-1].index(EOS) for row in expected)
    assert prepared.bytes_per_token("train") == entry["target_bytes"] / entry["targets"]
    assert prepared.card["dtype"] == "<i2"
    assert prepared.card["format"] == FORMAT_VERSION
    assert prepared.card["template"] == chat.TEMPLATE
    (note,) = [line for line in data_notes(prepared.card) if "longer" in line]
    assert note.startswith("4 of 141 conversations are longer than a row of 60 tokens: of 2 the first turns")


def test_held_out_sums_are_those_of_a_loop(prepared):
    """Of a model that gives every token the same probability, and of documents that share a row."""
    overrides = {"model.vocab_size": 258, "data.sequence_length": 59, "train.eval_rows": 0}
    run = tiny_config(**overrides, **{"data.source": "conversations:x", "data.tokenizer": "bytes"})
    mesh = partition.make_mesh(run.mesh)
    programs = make_programs(run, mesh)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), programs.state.params)
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, programs.state.params))
    scores = evaluate_held_out(programs, params, prepared, run, partition.process_share(mesh))
    entry = prepared.card["splits"]["valid"]
    assert scores.loss == pytest.approx(np.log(258), rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(np.log2(258) * entry["targets"] / entry["target_bytes"])
    held_out = [row for i, row in enumerate(conversations(101)) if i % 3 != 1 and i != 5]
    replies = [chat.fitting(masked_bytes(row), 60) for row in held_out]
    assert scores.documents["targets"] == [sum(i >= 0 for i in ids) for ids in replies]
    there = np.array(rows(prepared, "valid"))[:, 1:] >= 0
    ends = [1, 2, 4, 8, 16, 32, 59]
    expected = [int(there[:, a:b].sum()) for a, b in zip([0, *ends], ends, strict=False)]
    assert scores.by_position["targets"] == expected
    assert scores.by_position["loss"][0] is None


def test_the_floor_is_counted_on_replies(prepared):
    overrides = {"model.vocab_size": 258, "data.sequence_length": 59, "train.eval_rows": 0}
    run = tiny_config(**overrides, **{"data.source": "conversations:x", "train.steps": 900})
    floor = _floor_fields(run, prepared)
    assert floor.pop("tokens") == prepared.card["splits"]["train"]["targets"]
    # Replies are few words, so that two letters nearly give the third; the first row begins with a prompt.
    assert 0 < floor["trigram"] < floor["bigram"] < floor["unigram"] < np.log(258)


def test_sums_without_targets_are_left_out():
    nats = np.array([[1.0, 0.0, 2.0], [0.0, 4.0, 8.0]], np.float32)
    document = np.array([[0, -1, 0], [-1, 2, 1]])
    assert by_document(nats, document) == {"nats": [3.0, 8.0, 4.0], "targets": [2, 1, 1]}
    found = by_position(nats, document >= 0)
    assert found == {"to": [1, 2, 3], "loss": [1.0, 4.0, 5.0], "targets": [1, 1, 2]}


def test_a_call_is_right_if_all_its_tokens_are():
    tokenizer = BytesTokenizer()
    row = said(("user", "a"), ("call", "{1}"), ("assistant", "{ok"), ("user", "b"), ("assistant", "no"))
    (ids,) = chat.encode(tokenizer, [chat.conversation_of(row)])
    several = np.array([ids, ids, ids], np.int32)
    guesses = np.where(several >= 0, several, 0)[:, 1:]
    assert chat.wrong_calls(several, guesses, tokenizer) == 0
    guesses[1, ids.index(ord("1")) - 1] = 0  # a value of one call
    guesses[2, ids.index(ord("n")) - 1] = 0  # not a call
    assert chat.wrong_calls(several, guesses, tokenizer) == pytest.approx(1 / 6)
    guesses[0, ids.index(EOS) - 1] = 0  # the first call does not end
    assert chat.wrong_calls(several, guesses, tokenizer) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (said(("user", "a"), ("user", "b"), ("assistant", "c")), "messages 1 and 2 are both of the user"),
        (
            said(("human", "a"), ("assistant", "c")),
            "message 1 has the role 'human'; valid roles: system, user",
        ),
        (said(("user", "a"), ("assistant", " \n")), "message 2 is an empty turn of the assistant"),
        (said(("user", "a")), "no turn of the assistant"),
        (said(("user", "a"), ("result", "b"), ("assistant", "c")), "message 2 is a result, but no call"),
        (said(("user", "a"), ("system", "b"), ("assistant", "c")), "message 2 is of the system"),
        (said(("user", 3), ("assistant", "c")), "message 1 has content of type int"),
        (said(("user", "\ud800"), ("assistant", "c")), "message 1 contains half of a surrogate pair"),
        ({"messages": []}, "'messages' is not a list with at least one message"),
        ({"messages": ["hi"]}, "message 1 is not an object"),
        ({"text": "hi"}, "expected 'messages', or 'instruction' and 'output'; the row has the fields text"),
        ({"instruction": 1, "output": "a"}, "'instruction' or 'input' is not a string"),
    ],
)
def test_bad_conversations_name_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", [ALARM, row])
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: ") as error:
        data.prepare(config(tmp_path, source=f"conversations:{path}"), 258)
    assert message in str(error.value)


def test_conversations_that_cannot_be_packed(tmp_path):
    path = write(tmp_path / "long.jsonl", [said(("user", "u" * 99), ("assistant", "a"))])
    sources = {"source": f"conversations:{path}", "valid_source": f"conversations:{tmp_path}/v.jsonl"}
    write(tmp_path / "v.jsonl", [ALPACA] * 2)
    with pytest.raises(UserError, match="none of the 1 conversations of the train"):
        data.prepare(config(tmp_path, **sources, sequence_length=59), 258)
    (tmp_path / "no_eos.model").write_bytes(sentencepiece_model(eos_id=-1))
    spec = {"tokenizer": f"sentencepiece:{tmp_path}/no_eos.model"}
    with pytest.raises(UserError, match="has no EOS, which ends the replies"):
        data.prepare(config(tmp_path, **sources, **spec), 258)
    with pytest.raises(UserError, match="valid_source"):
        config(tmp_path, source=f"conversations:{path}", valid_source="bundled")


def test_transformers_applies_the_template_of_a_run(tmp_path):
    transformers = pytest.importorskip("transformers")
    from mobilellm_jax.formats.huggingface import _write_tokenizer
    from mobilellm_jax.runs.directory import TOKENIZER

    tokenizer = train_bpe("bpe:330", [plain(row) for row in ROWS] * 3)
    data.save_tokenizer(tokenizer, tmp_path / TOKENIZER, chat.TEMPLATE)
    (tmp_path / "exported").mkdir()
    _write_tokenizer(tmp_path / "exported", tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    (ids,) = chat.encode(tokenizer, [chat.conversation_of(ALARM)])
    found = theirs.apply_chat_template(ALARM["messages"], tokenize=True, return_dict=False)
    assert found == [max(i, ~i) for i in ids]


def test_export_takes_the_template_along(tmp_path):
    assert importlib.util.find_spec("tokenizers")
    from mobilellm_jax.formats.huggingface import _write_tokenizer
    from mobilellm_jax.runs.directory import TOKENIZER

    data.save_tokenizer(BytesTokenizer(), tmp_path / TOKENIZER, chat.TEMPLATE)
    (tmp_path / "exported").mkdir()
    _write_tokenizer(tmp_path / "exported", BytesTokenizer(), tmp_path)
    assert (tmp_path / "exported" / "chat_template.jinja").read_text() == chat.TEMPLATE
