"""The commands that use a run: generate and evaluate, from a run directory with random weights."""

import math
import os
import pty
import select
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import command, real
from conftest import apply, random_params, tiny_config

from mobilellm_jax.data import save_tokenizer
from mobilellm_jax.data.tokenizers import BytesTokenizer
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.runs.directory import IMPORTED, TOKENIZER, claim_workdir
from mobilellm_jax.storage.checkpoint import Checkpoints

CONFIG = tiny_config(**{"model.vocab_size": 258, "model.sharing": "0 1 0", "data.sequence_length": 40})
TEXT = "Grüße, 世界! " * 9


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG.model)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("run")
    claim_workdir(folder, CONFIG)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(4, {"params": params}, None)
    checkpoints.close()
    save_tokenizer(BytesTokenizer(), folder / TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def imported_without_bos(tmp_path_factory, workdir):
    """The same weights as an imported model whose tokenizer puts no BOS before a text."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    shutil.copytree(workdir, folder)
    (folder / IMPORTED).write_text("{}")
    (folder / TOKENIZER / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    return folder


def continued(params, texts, steps, before=(256,), temperature=0.0):
    """Returns the ids of the prompts, as `generate` reads them, and of what comes after them."""
    tokenizer = BytesTokenizer()
    prompts = [[*before, *ids] for ids in tokenizer.encode_batch(texts)]
    generator = Generator(params, CONFIG.model, Sampling(temperature=temperature, top_k=0, top_p=1.0), 40)
    columns = zip(*generator.start(prompts, steps, tokenizer.eos_id, 0), strict=True)
    return [
        prompt + [t for t in column if t is not None] for prompt, column in zip(prompts, columns, strict=True)
    ]


def test_generate_prints_ids_and_speeds(workdir, params):
    arguments = ["--prompt=a", "--prompt=world", "--max_new_tokens=9", "--print_ids"]
    result = real("experiments.generate", f"--workdir={workdir}", *arguments)
    expected = continued(params, ["a", "world"], 9)
    assert result.stdout.splitlines() == [",".join(map(str, ids)) for ids in expected], result.stderr
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["prefill", "decode"]
    assert "prefill: 8 tokens in" in result.stderr
    assert result.stderr.count("tokens/s") == 2


def test_generate_puts_no_bos_where_the_imported_tokenizer_does_not(imported_without_bos, params):
    arguments = ["--prompt=world", "--max_new_tokens=9", "--print_ids"]
    result = command("experiments.generate", f"--workdir={imported_without_bos}", *arguments)
    (expected,) = continued(params, ["world"], 9, before=())
    assert result.stdout == ",".join(map(str, expected)) + "\n", result.stderr


@pytest.mark.slow
def test_generate_prints_texts_in_order(workdir, params):
    arguments = ["--prompt=a", "--prompt=world", "--max_new_tokens=9"]
    result = command("experiments.generate", f"--workdir={workdir}", *arguments)
    expected = [BytesTokenizer().decode(ids) for ids in continued(params, ["a", "world"], 9)]
    shown = "\n---\n".join(expected).replace("\r\n", "\n").replace("\r", "\n")  # as a pipe in text mode
    assert result.stdout == shown + "\n", result.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate", ["--prompt="], "--prompt: is empty; --prompt_ids=256 begins a document"),
        ("generate", ["--prompt_ids=1,x"], "--prompt_ids: '1,x' is not valid; expected token ids"),
        ("generate", [], "--prompt: missing; give a text"),
        ("evaluate", [], "--text: missing; name a text"),
        ("evaluate", ["--text=bundled", "--limit=3"], "--limit=3: needs --tasks"),
        ("evaluate", ["--text=bundled", "--mesh=1"], "--mesh=1: expected three sizes, such as -1,1,1"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_bad_input_is_one_line(workdir, name, arguments, message):
    result = command(f"experiments.{name}", f"--workdir={workdir}", *arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert message in result.stderr


@pytest.mark.slow
def test_generate_asks_for_prompts_on_a_terminal(workdir, params):
    terminal, other = pty.openpty()
    line = [sys.executable, "-m", "experiments.generate", f"--workdir={workdir}", "--max_new_tokens=9"]
    line.append("--temperature=1")
    environment = {**os.environ, "PYTHONPATH": ".", "TERM": "dumb"}
    process = subprocess.Popen(line, stdin=other, stdout=other, stderr=other, env=environment)
    os.close(other)

    def read_until(text: bytes) -> bytes:
        seen, end = b"", time.monotonic() + 300
        while text not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)
        return seen

    read_until(b"prompt> ")
    expected = continued(params, ["world", "world"], 9, temperature=1.0)  # of one batch: two answers
    assert expected[0] != expected[1]
    for ids in expected:
        os.write(terminal, b"world\n")
        answer = read_until(b"prompt> ").decode(errors="replace").replace("\r\n", "\n")
        assert BytesTokenizer().decode(ids) in answer
    os.write(terminal, b"w" * 60 + b"\n")
    assert b"do not fit in the context of 40" in read_until(b"prompt> ")
    os.write(terminal, b"\x04")
    assert process.wait(timeout=300) == 0
    os.close(terminal)


@pytest.mark.parametrize(
    ("made", "before"),
    [pytest.param("workdir", [256], marks=pytest.mark.slow), ("imported_without_bos", [])],
    ids=["trained", "imported"],
)
def test_evaluate_scores_a_text(made, before, params, tmp_path, request):
    (tmp_path / "x.txt").write_text(TEXT)
    workdir = request.getfixturevalue(made)
    result = command("experiments.evaluate", f"--workdir={workdir}", f"--text=files:{tmp_path}/*.txt")
    stream = np.array([*before, *TEXT.encode(), 257])
    nats, tokens, size = 0.0, len(stream) - 1, len(TEXT.encode())
    for start in range(0, tokens, 40):
        row = stream[start : start + 41]
        read = np.pad(row[:-1], (0, 41 - len(row)))[None]  # one shape
        log_p = jax.nn.log_softmax(apply(params, read, CONFIG.model)[0])
        nats -= sum(float(log_p[i, token]) for i, token in enumerate(row[1:]))
    loss = nats / tokens
    assert result.stdout == (
        f"files:{tmp_path}/*.txt: {loss:.4f} nats per token, perplexity {math.exp(loss):,.3f}, "
        f"{nats / math.log(2) / size:.4f} bits per byte ({tokens} tokens, {size} bytes, 1 documents)\n"
    ), result.stderr
