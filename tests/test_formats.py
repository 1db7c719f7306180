"""ONNX, ExecuTorch and LiteRT: what their own runtimes compute from an exported run. Most tests are slow.

Each needs an extra, and is skipped without it: `python -m pip install -e '.[onnx,executorch,litert]'`.
"""

import os
import re
from importlib.util import find_spec

import numpy as np
import pytest
from commands import command
from conftest import apply, random_params, tiny_config
from test_huggingface import make_run

from mobilellm_jax.data.tokenizers import BytesTokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import executorch, litert, onnx, tools
from mobilellm_jax.formats.parity import ParityError

SHAPE = {"vocab_size": 320, "width": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_width": 96}
LENGTH = 32
BLOCK = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # weights of the matrices of a block


def needs(*packages, extra):
    """Marks a slow test that needs an extra."""
    missing = any(find_spec(package) is None for package in packages)
    skip = pytest.mark.skipif(missing, reason=f"not installed: {tools.install_line(extra)}")
    return lambda test: pytest.mark.slow(skip(test))


needs_onnx = needs("onnxruntime_genai", "onnx_ir", "torch", "transformers", extra="onnx")
needs_executorch = needs("executorch", "torch", extra="executorch")
needs_litert = needs("litert_torch", "ai_edge_litert", extra="litert")


def run_of(path, tokenizer=None, **fields):
    """Makes a run with random weights; returns its config and parameters."""
    model = {f"model.{name}": value for name, value in {**SHAPE, **fields}.items()}
    config = tiny_config(**model, **{"data.sequence_length": LENGTH})
    params = random_params(config.model)
    make_run(path, config, params, tokenizer or BytesTokenizer())
    return config, params


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def exported(tmp_path, name, out):
    """Exports a run by the command; returns what it says of sharing, and the difference and the positions.

    Not in this process, where a warning of torch would be an error, and XLA does not optimize: that rounds
    otherwise, by 2e-6 of the largest logit.
    """
    flags = [f"--workdir={tmp_path}/run", f"--format={name}", f"--out={out}"]
    result = command("experiments.export", *flags, env={"XLA_FLAGS": ""})
    assert result.returncode == 0, result.stderr
    *_, shared, parity = result.stdout.splitlines()
    found = re.search(r"within (\S+) of the largest .* at (\d+) of (\d+) positions$", parity)
    assert found[2] == found[3]
    return shared, float(found[1]), int(found[3])


# --- ONNX -----------------------------------------------------------------------------------------------


@needs_onnx
def test_onnx_runtime_computes_the_same_logits_and_stores_a_shared_block_once(tmp_path, record_property):
    """Token by token from an empty cache; one run with multipliers, and one whose head is no embedding."""
    from onnx_ir import load

    from mobilellm_jax.formats.onnx_runtime import Model

    shapes = {
        "twice": {
            "sharing": "immediate",
            "num_repeats": 2,
            "parameterization": "completep",
            "base_width": 32,
        },
        "deep": {"depth": 4, "share_embedding": False},
    }
    ids = np.random.default_rng(5).integers(0, 320, 9)
    for name, fields in shapes.items():
        (tmp_path / name).mkdir()
        config, params = run_of(tmp_path / name / "run", **fields)
        _, parity, positions = exported(tmp_path / name, "onnx", tmp_path / f"{name}.out")
        assert positions == LENGTH
        expected = apply(params, ids[None].astype(np.int32), config.model)[0]
        there = Model(tmp_path / f"{name}.out")
        found = [there.start(ids[:1].tolist()), *(there.extend([i]) for i in ids[1:].tolist())]
        difference = np.abs(np.concatenate(found) - expected).max() / np.abs(expected).max()
        record_property("figures", {"f32 logits of ONNX Runtime, of the largest": float(difference)})
        assert max(difference, parity) <= 5e-6
    data = {name: (tmp_path / f"{name}.out" / "model.onnx.data").stat().st_size for name in shapes}
    assert data["deep"] - data["twice"] == pytest.approx(4 * (2 * BLOCK + 320 * 64), rel=0.02)
    values = load(tmp_path / "twice.out" / "model.onnx").graph.initializers.values()
    used = [len(list(value.uses())) for value in values if len(value.shape) == 2]
    assert used.count(2) >= 2 * 5  # of each block: query, key and value in one, output, gate, up, down


@needs_onnx
@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_few_bits_in_onnx(tmp_path, kind, bits):
    config, params = run_of(tmp_path / "run", sharing="reverse", num_repeats=2)
    out = tmp_path / "out"
    result = command(
        "experiments.export", f"--workdir={tmp_path}/run", "--format=onnx", f"--type={kind}", f"--out={out}"
    )
    assert result.returncode == 0, result.stderr
    first, shared, parity = result.stdout.splitlines()
    assert first == f"exported 4 layers in {kind}, {size(out) / 1e6:.1f} MB; tokenizer: bytes; see {out}"
    assert shared == "2 blocks are applied as 4 layers, and their weights stored once"
    found = re.fullmatch(
        r"parity: logits of ONNX Runtime within (.*) of the largest \(at most 1e-04\), the same most "
        rf"probable token at 32 of 32 positions; {kind} itself changes them by (.*)",
        parity,
    )
    assert float(found[1]) <= 1e-5
    assert float(found[2]) > 1e-4
    files = {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(out)) == files
    # A float32 scale for each group of 32; an embedding of its own, where it is not the head of 4 bits.
    head, groups = 320 * 64, (2 * BLOCK + 320 * 64) / 32
    size_of = groups * (32 * bits / 8 + 4) + (4 * head if kind == "int8" else 0)
    assert (out / "model.onnx.data").stat().st_size == pytest.approx(size_of, rel=0.1)
    _, rounded = onnx._rounded(out / "model.onnx", params, config.model)
    for name in ("gate", "up"):
        w, there = (np.swapaxes(x["blocks"]["ffn"][name], 1, 2) for x in (params, rounded))  # inputs last
        groups, errors = (x.reshape(-1, 96, 2, 32) for x in (np.abs(w), np.abs(there[[0, 1]] - w)))
        # The largest number of a group is 2**(bits - 1) steps; one as large with the other sign loses a step.
        assert (errors.max(-1) <= groups.max(-1) / 2 ** (bits - 1) * 1.001).all()
        assert errors.max() > 0
    assert np.array_equal(rounded["embedding"], params["embedding"]) == (kind == "int8")
    assert np.array_equal(rounded["final_norm"]["gain"], params["final_norm"]["gain"])


@needs_onnx
def test_what_onnx_runtime_computes_otherwise_gets_no_name(tmp_path, monkeypatch):
    run_of(tmp_path / "run")
    monkeypatch.setattr(onnx, "our_logits", lambda *_: np.ones((LENGTH, 320), np.float32))
    with pytest.raises(ParityError, match=r"logits of ONNX Runtime differ from those of the run by"):
        onnx.export_run(tmp_path / "run", tmp_path / "out", "f32")
    assert os.listdir(tmp_path) == ["run"]


# --- ExecuTorch -----------------------------------------------------------------------------------------


@needs_executorch
def test_executorch_computes_the_same_logits_and_stores_a_shared_block_once(tmp_path, record_property):
    run_of(tmp_path / "run", depth=1, sharing="immediate", num_repeats=2, share_embedding=False)
    shared, difference, positions = exported(tmp_path, "executorch", tmp_path / "out")
    assert shared == "1 blocks are applied as 2 layers, and their weights stored once"
    record_property("figures", {"f32 logits of ExecuTorch, of the largest": difference})
    assert (positions, difference <= 5e-6) == (LENGTH // 2 + 1, True)
    program = (tmp_path / "out" / executorch.PROGRAM).stat().st_size
    around = 4 * 2 * 320 * 64  # bytes of embedding and head
    assert around + 4 * BLOCK < program < around + 1.8 * 4 * BLOCK  # the graph takes some, too
    assert set(os.listdir(tmp_path / "out")) == {
        executorch.PROGRAM,
        "tokenizer.json",
        "tokenizer_config.json",
    }


# --- LiteRT ---------------------------------------------------------------------------------------------


@needs_litert
def test_litert_computes_the_same_logits(tmp_path, record_property):
    run_of(tmp_path / "run", sharing="immediate", num_repeats=2)
    shared, difference, positions = exported(tmp_path, "litert", tmp_path / "out.litertlm")
    assert shared.startswith("2 shared blocks were written out as 4 layers")
    record_property("figures", {"f32 logits of LiteRT, of the largest": difference})
    assert (positions, difference <= 5e-6) == (LENGTH // 2, True)
    assert sorted(os.listdir(tmp_path)) == ["out.litertlm", "run"]


# --- bad input ------------------------------------------------------------------------------------------

DRIVERS = {"onnx": onnx, "executorch": executorch, "litert": litert}


def test_a_failing_converter_is_one_line(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError) as raised:
        tools.convert("onnx", tmp_path / "hf", "-c", "print(1); raise OSError(28, 'No space left')")
    assert str(raised.value) == (
        "--format=onnx: the converter ended with status 1: OSError: [Errno 28] No space left"
    )


@pytest.mark.parametrize("name", DRIVERS)
def test_a_missing_extra_names_its_install_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tools, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"^--format={name}: needs .*pip install -e '\.\[{name}\]'$"):
        DRIVERS[name].export_run(tmp_path / "run", tmp_path / "out", "f32")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_kind": "relu"}, r"model\.ffn_kind: 'relu' cannot be exported as a Llama"),
        ({"num_heads": 6, "num_kv_heads": 3}, r"model\.num_heads: 6 does not divide model\.width=64"),
        ({"sharing": "0 1 0", "loop_embedding": True}, r"^--format=\w+: model\.loop_embedding=True changes"),
    ],
    ids=str,
)
def test_what_is_no_llama_is_refused(tmp_path, monkeypatch, name, fields, message):
    monkeypatch.setattr(tools, "find_spec", lambda package: "installed")
    run_of(tmp_path / "run", **fields)
    with pytest.raises(UserError, match=message):
        DRIVERS[name].export_run(tmp_path / "run", tmp_path / "out", "f32")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 96}, r"model\.ffn_width equals model\.vocab_size=96, so that the builder takes a"),
        ({"vocab_size": 64}, r"model\.width and model\.num_heads \* model\.head_dim equals .*_size=64"),
        ({"vocab_size": 32}, r"model\.num_kv_heads \* model\.head_dim equals model\.vocab_size=32"),
        ({"head_dim": 24}, r"model\.head_dim=24, but ONNX Runtime takes multiples of 16 \(16 or 32 would"),
        ({"head_dim": 8}, r"model\.head_dim=8, but .* \(16 would fit\); use --format=gguf"),
    ],
    ids=str,
)
def test_shapes_that_onnx_gets_wrong_are_refused(fields, message):
    model = {f"model.{name}": value for name, value in {**SHAPE, **fields}.items()}
    with pytest.raises(UserError, match=message):
        onnx.check_exportable(tiny_config(**model).model)


def test_a_run_without_a_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "find_spec", lambda package: "installed")
    config, params = tiny_config(), random_params(tiny_config().model)
    make_run(tmp_path / "run", config, params)
    with pytest.raises(UserError, match=r"^--format=litert: the run keeps no tokenizer"):
        litert.export_run(tmp_path / "run", tmp_path / "out", "f32")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "has NaN or infinite weights"), (0.0, "all weights are 0")]
)
def test_weights_that_no_model_has_are_refused(tmp_path, monkeypatch, value, message):
    monkeypatch.setattr(tools, "find_spec", lambda package: "installed")
    config = tiny_config()
    params = random_params(config.model)
    params["blocks"]["ffn"]["up"][1] = value
    make_run(tmp_path / "run", config, params, BytesTokenizer())
    with pytest.raises(UserError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight: {message}"):
        executorch.export_run(tmp_path / "run", tmp_path / "out", "f32")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onnx"], "--out: missing; name what to make, such as --out=first-onnx"),
        (["--format=litert", "--out=x", "--type=q8_0"], "--type=q8_0: --format=litert holds f32"),
        (["--format=onnx", "--out=x", "--mixed"], "--mixed: does not apply to --format=onnx"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line(tmp_path, flags, message):
    result = command("experiments.export", f"--workdir={tmp_path}", *flags)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert message in result.stderr
