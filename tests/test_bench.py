"""The benchmark: sides take turns, ratios are those within a turn, and every part runs on small models."""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import command, real

from experiments.benchmarks import (
    compile,
    decode,
    finetuning,
    loops,
    measure,
    ondevice,
    pytorch,
    sweep,
    training,
    trials,
)

PARTS = [compile, decode, finetuning, loops, training, trials]
ROOT = Path(__file__).parents[1]


def test_sides_take_turns_after_one_call_to_warm_up():
    calls = []
    seconds = measure.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_seconds_are_those_of_the_calls():
    seconds = measure.alternate({"slow": lambda: time.sleep(0.05), "fast": lambda: None}, 2)
    assert min(seconds["slow"]) >= 0.05
    assert sum(seconds["fast"]) < sum(seconds["slow"])


def test_ratios_are_of_the_same_turn():
    assert measure.ratios([1.0, 9.0], [2.0, 3.0]) == (0.5, 3.0)
    assert measure.rates(6, [2.0, 3.0]) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("bounds", "is_met", "text"),
    [
        ({"at_least": 2.0}, True, "at least 2: met"),
        ({"at_least": 2.1}, False, "at least 2.1: MISSED"),
        ({"at_most": 2.0}, True, "at most 2: met"),
        ({"at_most": 1.0}, False, "at most 1: MISSED"),
        ({}, None, ""),
    ],
)
def test_a_target_is_met_by_the_median(bounds, is_met, text):
    line = measure.Line("a", "x", (1.0, 2.0, 9.0), **bounds)
    assert line.is_met is is_met
    table = measure.columns([line])
    assert [cells[0] for cells in table.values()] == ["a", "2 x", "1 .. 9", text]
    assert measure.Line.from_json(json.loads(json.dumps(line.to_json()))) == line


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [compile, decode, finetuning, loops, sweep, training, trials], ids=lambda m: m.__name__
)
def test_parts_run(module):
    lines = module.measure(quick=True)
    assert len({line.name for line in lines}) == len(lines)
    for line in lines:
        assert all(value > 0 for value in line.values), line


@pytest.mark.parametrize(
    ("name", "gigabytes", "expected"), [("125m", 24, 1), ("125m", 64, 2), ("12 x 128", 24, 2)]
)
def test_pytorch_runs_as_far_as_memory_holds_its_models(name, gigabytes, expected, monkeypatch):
    monkeypatch.setattr(pytorch, "device_bytes", lambda: gigabytes * 10**9)
    variants = pytorch._variants(name, quick=False)
    assert len(variants) == expected
    assert variants[-1] == "torch.compile"


def test_pytorch_takes_the_same_steps():
    if reason := pytorch.missing():
        pytest.skip(reason)
    eager, ours, ratio = pytorch.measure(quick=True)  # which compares the numbers of parameters
    assert [value > 0 for value in (*eager.values, *ours.values)] == [True] * 4
    assert ratio.values == measure.ratios(ours.values, eager.values)


@pytest.mark.slow
def test_a_run_is_measured_in_llama_cpp(tmp_path):
    if any(find_spec(name) is None for name in ondevice.NEEDED):
        pytest.skip("llama.cpp is not installed")
    flags = ["--config.model.depth=2", "--config.train.steps=1", "--config.optimizer.warmup_steps=1"]
    flags += ["--config.train.eval_rows=8", f"--config.data.cache_dir={tmp_path}/cache"]
    assert command("experiments.train", f"--workdir={tmp_path}/run", *flags).returncode == 0
    result = command("experiments.bench", "--only=ondevice", "--quick", f"--workdir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run/bench/cpu/ondevice.json").read_text())
    lines = {line["name"]: line["median"] for line in record["lines"]}
    sides = [f"run, {kind}, AVX2" for kind in ("f16", "q8_0", "q4_0")]
    if find_spec("onnxruntime_genai"):
        sides += [f"run, {kind}, ONNX Runtime" for kind in ("int8", "int4")]
    else:
        assert "ONNX Runtime is left out: --format=onnx: needs" in result.stdout
    sides += ["run, float32, our own"]
    assert list(dict.fromkeys(name.partition(":")[0] for name in lines)) == sides
    assert all(value > 0 for value in lines.values())
    assert lines["run, q4_0, AVX2: file"] < lines["run, q8_0, AVX2: file"] < lines["run, f16, AVX2: file"]


@pytest.mark.slow
def test_the_command_leaves_a_record_that_can_be_shown(tmp_path):
    flags = ["experiments.bench", "--only=trials", f"--workdir={tmp_path}"]
    measured = command(*flags, "--quick")
    assert measured.returncode == 0, measured.stderr
    assert "| 4 together / 1 |" in measured.stdout
    shown = command(*flags, "--show")
    assert shown.stdout.strip() == measured.stdout.strip()
    again = command(*flags, "--quick", "--label=newer")
    assert "\ntrials, newer" in again.stdout
    both = command(*flags, "--show").stdout
    assert measured.stdout.strip() in both
    assert again.stdout.strip() in both


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only=trainings"], "--only=trainings: there is no such part; did you mean training?"),
        (["--only=pytorch", "--shapes=125"], "--shapes=125: unknown model; did you mean 125m?"),
        (["--only=training,pytorch", "--shapes=350m"], "--shapes=350m: unknown model"),
        (["--only=training,decode", "--shapes=125m"], "--shapes: does not apply to decode"),
        (["--only=ondevice", "--llama_cpp=nowhere"], "--llama_cpp=nowhere: has no libllama*.so with"),
        (["--only=training", "--label=a/b"], "--label=a/b: part of the name of a file"),
        (["--show"], "no measurements there; run without --show first"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, flags, message):
    result = command("experiments.bench", f"--workdir={tmp_path}", *flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_numbers_that_mean_nothing_do_not_replace_those_that_do():
    result = command("experiments.bench", "--only=trials", "--quick")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "--quick: needs --workdir" in result.stderr


def test_numbers_on_the_page_are_those_of_the_records():
    page = (ROOT / "docs" / "performance.md").read_text().partition("## Measurements")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    shown = real("experiments.bench", "--show")
    assert rows
    assert set(rows) == {line for line in shown.stdout.splitlines() if line.startswith("| ")}
