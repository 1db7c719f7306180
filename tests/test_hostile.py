"""Thousands of random configs and files: each is taken, or refused by name; nothing is unpickled or run."""

import ast
import dataclasses
import gzip
import json
import lzma
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from conftest import tiny_config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mobilellm_jax import config
from mobilellm_jax.costs import accounting
from mobilellm_jax.data.sources import open_source
from mobilellm_jax.data.tasks import open_task
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.huggingface_config import context_length, model_fields, read_object
from mobilellm_jax.parallel import partition
from mobilellm_jax.training import optimizer

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("mobilellm_jax", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))
]
GROUPS = {group.name: group.type for group in dataclasses.fields(config.Config)}
FIELDS = [f"{group}.{field.name}" for group, cls in GROUPS.items() for field in dataclasses.fields(cls)]
TYPES = {f"{group}.{f.name}": f.type for group, cls in GROUPS.items() for f in dataclasses.fields(cls)}
WORDS = [
    *config.FFN_KINDS,
    *config.REMAT_POLICIES,
    *config.PARAMETERIZATIONS,
    *config.OPTIMIZERS,
    *config.SCHEDULES,
    *("none", "immediate", "repeat_all", "reverse", "float32", "bfloat16", "bundled", "files:x", "tokens:x"),
    *("bytes", "bpe:512", "bpe:x", "0 1 2 1", "0 0", "1", "²", "0 ٣", "9" * 5000, "\0", "\ud800", ""),
    *("khop:hops=2,min_hops=1,symbols=9,queries=2", "addition:operands=2,digits=2", "khop:hops=9", "recall:"),
    "khop:hops=400000000,min_hops=1,symbols=900000000,queries=2",
    *("structure:levels=2,symbols=3,rules=2,grammar=1,tokens=16", "breadth:vertices=4,parents=2"),
    "structure:levels=9,symbols=100,rules=20,grammar=999999999,tokens=999999999",
    "structure:levels=900000000,symbols=3,rules=2,grammar=1,tokens=128",
    "manipulation:modulus=5,operations=2,operators=3",
    "manipulation:modulus=999999937,operations=400000000,operators=3",
    "knowledge:people=9,attributes=2,values=4,wordings=1,symbols=3,exposures=1",
    "knowledge:people=900000000,attributes=9,values=9,wordings=9,symbols=900000000,exposures=9",
    "breadth:vertices=900000000,parents=2",
]
INTEGERS = st.one_of(st.integers(-2, 70), st.sampled_from([*(2**k for k in range(71)), 10**9 + 7, 10**400]))
VALUES = {
    int: INTEGERS,
    float: st.one_of(st.floats(), INTEGERS),
    str: st.one_of(st.sampled_from(WORDS), st.text(max_size=9)),
    bool: st.booleans(),
}
LIKELY = {
    int: st.sampled_from([1, 2, 4, 8, 16, 24, 48]),
    float: st.floats(0.01, 0.99),
    str: st.sampled_from(WORDS),
    bool: st.booleans(),
}
ANYTHING = st.one_of(
    *VALUES.values(), st.none(), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(), st.none())
)
# The same examples every time; a failure is not made smaller, which would take longer than all of it.
DETERMINISTIC = settings(
    max_examples=2000,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def changes(draw) -> dict:
    """Returns new values of one to three fields: half of them likely, a tenth of any type."""
    names = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True))
    kinds = draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    return {
        name: draw(ANYTHING if kind == 0 else (VALUES if kind < 5 else LIKELY)[TYPES[name]])
        for name, kind in zip(names, kinds, strict=False)
    }


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_random_config_builds_or_the_error_names_a_field(count):
    """As many of them, through all that is looked at before the first program is compiled."""
    plain = config.to_dict(tiny_config())
    counts = Counter()

    @settings(DETERMINISTIC, max_examples=count)
    @given(changes())
    def build(changes: dict) -> None:
        values = {group: dict(fields) for group, fields in plain.items()}
        for name, value in changes.items():
            group, field = name.split(".")
            values[group][field] = value
        try:
            run = config.from_config_dict(values)
            partition.check_divisible(run, partition.make_mesh(run.mesh))
            accounting.budgets(run.model, run.data.sequence_length, run.train.batch_size)
            optimizer.make_optimizer(run.optimizer, run.model)
            optimizer.learning_rate_schedule(run.optimizer, run.train.steps)
            if run.data.is_task:
                open_task(run.data)
        except UserError as error:
            counts["refused"] += any(name in str(error) for name in [*FIELDS, "mesh:"])
        else:
            counts["built"] += 1

    build()
    assert counts.total() == count, counts
    assert min(counts["built"], counts["refused"]) >= 0.15 * count, counts


LLAMA = {  # every field of a config.json that import reads
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "layer_types": ["full_attention", "full_attention"],
    "share_embedding": None,
    "layer_sharing": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}
LEAVES = [None, True, False, 0, 1, 2, 4, -3, 16, 10**9, 10**400, 1.0, 1e-5, 1e4, float("nan"), float("inf")]
LEAVES += ["llama", "mobilellm", "default", "full_attention", "silu", "yarn", "", "\ud800", [], {}]
KEYS = ["rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"]


def json_value(rng: random.Random, deep: int = 2):
    """Returns a random JSON value, of the kind that config.json may hold somewhere."""
    kind = rng.random()
    if deep and kind < 0.2:
        return [json_value(rng, deep - 1) for _ in range(rng.randrange(3))]
    if deep and kind < 0.4:
        return {rng.choice(KEYS): json_value(rng, deep - 1) for _ in range(rng.randrange(3))}
    return rng.choice(LEAVES)


def test_a_random_config_json_is_taken_or_the_error_names_a_field():
    """4,000 of them, each with one or two fields of any JSON value, through all that import asks of it."""
    plain = config.to_dict(tiny_config())
    rng, counts = random.Random(0), Counter()
    for _ in range(4000):
        hf = {
            **LLAMA,
            **{name: json_value(rng) for name in rng.sample(list(LLAMA), 1 + (rng.random() < 0.2))},
        }
        try:
            values = {group: dict(fields) for group, fields in plain.items()}
            values["model"] |= model_fields(hf)
            values["data"]["sequence_length"] = context_length(hf)
            config.from_config_dict(values)
        except UserError as error:
            counts["refused"] += any(name in str(error) for name in ["config.json: ", *FIELDS])
        else:
            counts["taken"] += 1
    assert counts.total() == 4000, counts
    assert min(counts["taken"], counts["refused"]) >= 300, counts


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff", b"[]", b""])
def test_a_config_json_that_is_no_object_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: (cannot be read as JSON|expected a JSON object)"):
        read_object(tmp_path / "config.json")


def jsonl(key: str, values: list) -> bytes:
    return "".join(json.dumps({key: value}) + "\n" for value in values).encode()


CONTENTS = {
    "a.txt": "Grüße an alle, in UTF-8.\n".encode() * 4,
    "a.jsonl": jsonl("text", ["one", "two", "\u00fc", ""]),
    "tokens.jsonl": jsonl("token_ids", [[1, 2, 3], [], [2**31 - 1]]),
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"[" * 3000,
    b"9" * 5000,
    b'"\\ud800"',
    b"1e999",
    b"NaN",
    b"\n",
    b"true",
    b"null",
]


def spoilt(content: bytes, rng: random.Random) -> bytes:
    """Returns random bytes, or `content` with some of its bytes changed, left out, doubled or put in."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(1, 200))
    for _ in range(rng.randrange(1, 4)):
        i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        middle = rng.choice([rng.randbytes(j - i), b"", content[i:j] * 2, rng.choice(PIECES)])
        content = content[:i] + middle + content[j:]
    return content


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_random_bytes_is_read_or_the_error_names_it(tmp_path, name, suffix):
    """In all 2,400 files; bytes are spoilt before they are compressed, after it, or both."""
    rng, counts = random.Random(name + suffix), Counter()
    path = tmp_path / (name + suffix)
    kind = "tokens" if name == "tokens.jsonl" else "files"
    for _ in range(200):
        content, inside = CONTENTS[name], rng.random() < 0.5
        content = COMPRESS[suffix](spoilt(content, rng) if inside else content)
        path.write_bytes(content if inside and rng.random() < 0.5 else spoilt(content, rng))
        try:
            documents = list(open_source(f"{kind}:{path}", "text").read(lambda count: None))
        except UserError as error:
            counts["refused"] += str(path) in str(error)
        else:
            counts["read"] += 1
            assert all(type(document) is (list if kind == "tokens" else str) for document in documents)
    assert counts.total() == 200, counts
    assert counts["refused"] >= 20, counts


FORBIDDEN = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "code", "runpy")
CALLS = ("eval", "exec", "compile", "__import__", "load_pickle")
LOADS = ("np", "numpy", "torch", "yaml")  # what of these has "load" in its name unpickles, or may


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_evaluates(path):
    """`experiments/cli.py` runs the config file that the command line names, `mobilellm` a command by name.

    Nothing else that is read is run.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            allowed = {"runpy"} if path.name == "__main__.py" else set()
            found = {name.split(".")[0] for name in names} & set(FORBIDDEN)
            assert found <= allowed, ast.unparse(node)
            assert names[-1] not in LOADS or isinstance(node, ast.Import), ast.unparse(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            allowed = {"exec", "compile"} if path == ROOT / "experiments/cli.py" else set()
            assert called not in CALLS or called in allowed, ast.unparse(node)
            assert not called.endswith(".exec_module"), ast.unparse(node)
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), ast.unparse(node)
            module, _, function = called.rpartition(".")
            assert module not in LOADS or "load" not in function or called == "yaml.safe_load", called


WATCHED_RUN = """
import runpy, sys
def watch(event, arguments):
    if event == "pickle.find_class":
        print("unpickled", arguments)
sys.addaudithook(watch)
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_run_that_resumes_unpickles_nothing(tmp_path):
    """Nor does any library that it uses: Python itself tells of every class that is unpickled."""
    fields = {
        "model.depth": 1,
        "model.width": 8,
        "model.num_heads": 1,
        "model.ffn_width": 8,
        "train.steps": 4,
        "data.tokenizer": "bytes",
        "data.sequence_length": 8,
        "optimizer.warmup_steps": 1,
        "data.source": f"files:{tmp_path}/*.txt",
        "data.cache_dir": tmp_path / "cache",
        "train.checkpoint_every": 2,
        "train.eval_rows": 16,
        "data.valid_fraction": 0.3,
    }
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 10)
    command = [sys.executable, "-c", WATCHED_RUN, f"--workdir={tmp_path}/run"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    for said in ("finished", "resuming after step 2"):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert said in done.stdout, done.stdout + done.stderr
        assert "unpickled" not in done.stdout
        (tmp_path / "run" / "record.json").unlink()
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
