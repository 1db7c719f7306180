"""The latency model on data with known coefficients, its shapes, tables, studies, and the command."""

import dataclasses
import json
import types

import numpy as np
import pytest
from commands import command
from conftest import random_params, tiny_config, tiny_model
from gguf import GGUFReader

from configs import base
from experiments.runner import latencies, timing
from experiments.runner.studies import points_of_module
from mobilellm_jax.analysis.latency_table import Measured, Table, digest, fitted, read_table, write_table
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.latency import LLAMA_CPP, TIMES, Latency, features, fit, split
from mobilellm_jax.costs.latency_design import designed
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import gguf

CACHE_MB = 12.0
KNOWN = {  # milliseconds for a unit of work
    "decode_ms": dict(
        zip(
            split(features("decode_ms", tiny_model(), 32), CACHE_MB),
            (0.01, 0.02, 0.03, 0.006, 0.2, 0.001, 0.05, 0.1),
            strict=True,
        )
    ),
    "prefill_ms": dict(
        zip(features("prefill_ms", tiny_model(), 32), (0.1, 0.05, 0.02, 0.09, 8.0, 10.0, 0.5), strict=True)
    ),
}
SHAPES = designed(tiny_model(), 40, 50, 256)


def true_ms(time, config, slots):
    work = split(features(time, config, slots), CACHE_MB)
    return sum(KNOWN[time][name] * amount for name, amount in work.items())


def synthetic(noise=0.0):
    """A table of times that follow the known coefficients."""
    rng, plain = np.random.default_rng(0), tiny_model()
    points = []
    for config, slots in SHAPES:
        ms = {time: true_ms(time, config, slots) * float(np.exp(noise * rng.normal())) for time in TIMES}
        medians = {f"{time[:-3]}_median_ms": 1.02 * value for time, value in ms.items()}
        fields = {name: value for name, value in vars(config).items() if value != getattr(plain, name)}
        points.append(Measured(fields=fields, slots=slots, **ms, **medians))
    fits = fitted({"float32": points}, plain)
    return Table(
        program="a program",
        device={"platform": "cpu", "kind": "a CPU", "count": 1, "cores": 2},
        threads=1,
        versions={"jax": "0.10.2"},
        git_commit=None,
        command="python -m experiments.latency",
        created="2026-01-01T00:00:00+00:00",
        base=dataclasses.asdict(plain),
        points={"float32": [dataclasses.asdict(point) for point in points]},
        fits={kind: {t: dataclasses.asdict(of) for t, of in times.items()} for kind, times in fits.items()},
    )


def test_known_coefficients_are_found():
    latency = synthetic().latency()
    for time in TIMES:
        found = latency.fits["float32"][time]
        assert found.coefficients == pytest.approx(KNOWN[time], rel=1e-6)
        assert max(found.errors) < 1e-9
        assert found.cache_mb == (CACHE_MB if time == "decode_ms" else None)
    shape = dataclasses.replace(SHAPES[0][0], depth=5, sharing="reverse", num_repeats=2)
    expected = {time: pytest.approx(true_ms(time, shape, 64)) for time in TIMES}
    assert latency.predict(shape, 64) == expected


def test_errors_are_those_of_shapes_left_out():
    table = synthetic(noise=0.05)
    work = [features("decode_ms", *shape) for shape in SHAPES]
    times = [point["decode_ms"] for point in table.points["float32"]]
    found = table.latency().fits["float32"]["decode_ms"]
    for out in (0, 7, 39):
        rest = [place for place in range(len(SHAPES)) if place != out]
        other = fit([work[i] for i in rest], [times[i] for i in rest], rest)
        assert found.errors[out] == pytest.approx(abs(other.predict(work[out]) / times[out] - 1))
    assert 0.02 < found.median_error < 0.06


def test_samples_of_one_shape_are_left_out_together():
    rows = [{"a": 1.0, "b": float(i)} for i in range(1, 9)]
    times = [2 + 3 * row["b"] for row in rows]
    times[7] *= 2  # what its twin would have learned from it
    together = fit([*rows, rows[7]], [*times, times[7]], [*range(8), 7])
    assert together.errors[7] == together.errors[8] == pytest.approx(0.5)


def test_no_coefficient_is_negative():
    rows = [{"a": 1.0, "b": float(i)} for i in range(1, 9)]
    found = fit(rows, [20.0 - row["b"] for row in rows], range(8))
    assert found.coefficients["b"] == 0
    assert found.coefficients["a"] > 0


def test_too_few_shapes():
    rows = [features("decode_ms", *shape) for shape in SHAPES[:15]]
    with pytest.raises(UserError, match="15 shapes for 8 coefficients; measure at least 16"):
        fit(rows, [1.0] * 15, range(15))


@pytest.mark.parametrize(
    ("sharing", "repeats", "reads", "again"),
    [("none", 1, 3, 0), ("immediate", 2, 3, 3), ("repeat_all", 2, 6, 0), ("reverse", 2, 5, 1)],
)
def test_bytes_of_a_token_are_those_of_the_accounting(sharing, repeats, reads, again):
    model = tiny_model(depth=3, sharing=sharing, num_repeats=repeats)
    work = features("decode_ms", model, 16)
    gains = 4 * (2 * reads + 1) * model.width  # and a row of the embedding
    read, head = 1e6 * work["MB of weights"], 4 * model.vocab_size * model.width
    assert read + gains + 4 * model.width == pytest.approx(accounting.decode_bytes_per_token(model))
    assert 1e6 * work["MB of blocks used again at once"] == pytest.approx(again / reads * (read - head))
    keys_and_values = 16 * accounting.kv_cache_bytes_per_token(model)
    assert 1e6 * work["MB of keys and values"] == pytest.approx(keys_and_values)
    assert 1e6 * work["working set"] == pytest.approx((read - head) * 3 / reads + head + keys_and_values)


@pytest.mark.parametrize(("megabytes", "from_memory"), [(3, 0), (10, 0), (13, 0.3), (20, 1), (50, 1)])
def test_weights_come_from_a_cache_as_far_as_they_stay_there(megabytes, from_memory):
    work = {"MB of weights": 8.0, "tokens": 1.0, "working set": float(megabytes)}
    found = split(work, 10.0)
    assert found["MB of weights from memory"] == pytest.approx(8 * from_memory)
    assert found["MB of weights from a cache"] == pytest.approx(8 * (1 - from_memory))
    assert found["tokens"] == 1
    assert len(found) == 3
    assert split(work, None) == {"MB of weights": 8.0, "tokens": 1.0}


def test_products_of_a_prompt_are_those_of_the_accounting():
    model = tiny_model(depth=3)
    work = features("prefill_ms", model, 16)
    plain = accounting.forward_flops_per_token(model, 8) - 2 * model.width * model.vocab_size
    attended = 4 * model.effective_depth * model.num_heads * model.head_dim * 4.5
    assert 1e9 * work["GFLOP of products"] == pytest.approx(8 * (plain - attended))


def test_shapes_are_the_same_ones_and_cover_the_space():
    assert designed(tiny_model(), 10, 50, 256) == SHAPES[:10]
    models = [config for config, _ in SHAPES]
    assert {config.sharing for config in models} == {"none", "immediate", "repeat_all", "reverse"}
    assert {slots for _, slots in SHAPES} == {32, 64, 128, 256}
    for name, low, high in (("depth", 2, 16), ("width", 64, 300), ("vocab_size", 500, 15_000)):
        values = [getattr(config, name) for config in models]
        assert min(values) < low, name
        assert max(values) > high, name
    logs = np.log([[config.depth, config.width, config.vocab_size] for config in models])
    assert np.abs(np.corrcoef(logs.T) - np.eye(3)).max() < 0.5


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_bytes_in_llama_cpp_are_those_of_the_file(kind, tmp_path):
    """Each layer of a shared model has a block of its own there, and all are read for a token."""
    (shape, _), *_ = designed(tiny_model(sharing="immediate", num_repeats=2), 1, 9, 64, kind, multiple=32)
    shape = dataclasses.replace(shape, sharing="immediate", num_repeats=2)
    config = dataclasses.replace(tiny_config(), model=shape)
    gguf.write(tmp_path / "a.gguf", config, random_params(shape), kind)
    matrices = [t.n_bytes for t in GGUFReader(tmp_path / "a.gguf").tensors if "norm" not in t.name]
    work = features("decode_ms", shape, 32, kind)
    assert 1e6 * work["MB of weights"] == pytest.approx(sum(matrices))
    numbers = 2 * shape.effective_depth * shape.num_kv_heads * shape.head_dim * 32
    assert 1e6 * work["MB of keys and values"] == pytest.approx(2 * numbers)


@pytest.mark.parametrize(("slots", "head_dim"), [(32, 16), (32, 64), (128, 16), (512, 40)])
def test_work_in_llama_cpp_is_that_of_a_plain_loop(slots, head_dim):
    """Multiplications for each token of each layer, scores for each query, or for each pair of tiles."""
    model = tiny_model(depth=2, sharing="repeat_all", num_repeats=2, num_heads=4, num_kv_heads=2)
    model = dataclasses.replace(model, head_dim=head_dim, width=96, ffn_width=160)
    queries, keys, T = 4 * head_dim, 2 * head_dim, slots // 2
    multiplications = single = in_tiles = 0
    for layer in range(4):
        for token in range(T):
            multiplications += 96 * (queries + 2 * keys) + queries * 96
            if layer < 3 or token == T - 1:
                multiplications += 3 * 96 * 160
        for _ in range(4):
            for row in range(T):
                single += (row + 1) * (T < 64)
            for first in range(0, T - 63, 64):
                in_tiles += sum(64 * 64 for start in range(0, T, 64) if start <= first + 63)
    work = features("prefill_ms", model, slots, "q8_0")
    assert 1e9 * work["GFLOP of products"] == pytest.approx(2 * multiplications)
    assert 1e6 * work["millions of single scores"] == pytest.approx(single)
    assert 1e6 * work["millions of scores in tiles"] == pytest.approx(in_tiles)
    assert 1e9 * work["GFLOP of tiles"] == pytest.approx(2 * 2 * head_dim * in_tiles)
    beyond = {16: 16, 64: 0, 40: 8}[head_dim]
    assert 1e6 * work["millions of numbers beyond vectors"] == pytest.approx(single * beyond)
    of_token = features("decode_ms", model, slots, "q8_0")
    assert 1e3 * of_token["thousands of scores"] == 4 * 4 * slots
    assert 1e3 * of_token["thousands of numbers beyond vectors"] == pytest.approx(4 * 4 * slots * beyond)


def test_shapes_for_llama_cpp_have_rows_of_whole_groups():
    for config, _ in designed(tiny_model(), 40, 50, 256, "q4_0", multiple=32):
        gguf.check_exportable(config, "q4_0")


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "latency" / "a.json"
    table = synthetic(noise=0.05)
    write_table(table, path)
    again = read_table(path)
    assert digest(again) == digest(table)
    assert again.latency().predict(SHAPES[3][0], 64) == table.latency().predict(SHAPES[3][0], 64)
    assert again.busy == pytest.approx(0.02)
    plain = tiny_model()
    points = {kind: [Measured(**point) for point in of] for kind, of in again.points.items()}
    refitted = fitted(points, plain)["float32"]["prefill_ms"]
    assert refitted == again.latency().fits["float32"]["prefill_ms"]
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
    with pytest.raises(UserError, match=r"a\.json: not a table of latency: changed since it was written"):
        read_table(path)
    with pytest.raises(UserError, match=r"missing\.json: not a table of latency.*--out="):
        read_table(tmp_path / "missing.json")


def test_types_that_were_not_measured():
    table = synthetic()
    with pytest.raises(UserError, match="weights in 'q4_0' were not measured; measured: float32"):
        table.latency("q4_0")
    with pytest.raises(UserError, match="weights in 'bfloat16' were not measured"):
        table.latency().predict(tiny_model(compute_dtype="bfloat16"), 16)
    half = tiny_model(compute_dtype="bfloat16")
    assert table.latency("float32").predict(half, 16)["decode_ms"] > 0


def test_what_lies_outside_of_the_shapes_measured_is_named():
    latency = synthetic().latency()
    assert latency.outside(*SHAPES[5]) == []
    (line,) = latency.outside(tiny_model(depth=40, vocab_size=20_000), 64)
    assert line == "layers 40, measured 1 to 28"


@pytest.mark.slow
def test_a_shape_is_measured():
    config = tiny_model(sharing="immediate", num_repeats=2)
    said = []
    (point,) = timing.measured([(config, 32)], tiny_model(), 2, timing.ours, said.append)
    assert 0 < point.decode_ms <= point.decode_median_ms < 1e3
    assert 0 < point.prefill_ms <= point.prefill_median_ms < 1e4
    assert point.slots == 32
    assert {"sharing": "immediate", "num_repeats": 2}.items() <= point.fields.items()
    assert len(said) == 3


# --- studies --------------------------------------------------------------------------------------------


def study_of(table, tolerance, rows):
    """A module of a study matched by the time of a token."""
    study = base.Study(
        question="Deep or wide at equal latency?",
        scientific=("model.depth", "model.width"),
        learning_rates=(),
        matched="decode_ms",
        latency=table,
        tolerance=tolerance,
        seeds=1,
        margin=0.1,
    )
    config = base.get_config()
    return types.SimpleNamespace(
        __file__=__file__, get_config=lambda _: config, study=lambda _: study, sweep=lambda _: rows
    )


ROWS = [{"model.depth": 4, "model.width": 128}, {"model.depth": 2, "model.width": 192}]


def test_a_study_is_matched_by_latency_and_its_records_name_the_table(tmp_path):
    table = synthetic()
    write_table(table, tmp_path / "a.json")
    module = study_of(f"{tmp_path}/a.json", 0.9, ROWS)
    points = points_of_module(module, "a.py", "", None)
    for point in points:
        field = point.facts["latency"]
        assert field["decode_ms"] == pytest.approx(true_ms("decode_ms", point.config.model, 256))
        assert field["prefill_ms"] == pytest.approx(true_ms("prefill_ms", point.config.model, 256))
        assert field["sha256"] == digest(table)
        assert field["table"] == f"{tmp_path}/a.json"
    times = [point.facts["latency"]["decode_ms"] for point in points]
    apart = max(times) / min(times) - 1
    with pytest.raises(UserError, match=rf"equal decode ms within 1%.* {apart:.1%} apart"):
        points_of_module(study_of(f"{tmp_path}/a.json", 0.01, ROWS), "a.py", "", None)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "a.py: latency: missing; matched='decode_ms' needs a table"),
        ("nowhere.json", "a.py: latency: nowhere.json: not a table of latency"),
    ],
)
def test_a_study_without_its_table(table, message):
    with pytest.raises(UserError, match=message):
        points_of_module(study_of(table, 0.9, ROWS), "a.py", "", None)


def test_what_is_said_of_a_table_that_is_not_to_be_trusted(tmp_path):
    table = synthetic(noise=0.4)
    slow = [{**point, "decode_median_ms": 9.0} for point in table.points["float32"]]
    write_table(dataclasses.replace(table, points={"float32": slow}), tmp_path / "a.json")
    named = latencies.named(f"{tmp_path}/a.json:float32")
    notes = named.notes({"deep": tiny_model(depth=40)}, 64)
    assert len(notes) == 3
    assert "not idle" in notes[0]
    assert "misses shapes that it was not fitted to" in notes[1]
    assert "design deep lies outside" in notes[2]


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_shows_a_table(tmp_path):
    write_table(synthetic(noise=0.05), tmp_path / "a.json")
    done = command("experiments.latency", f"--table={tmp_path}/a.json")
    assert done.returncode == 0, done.stderr
    assert "a CPU, 1 thread, a program; 2026-01-01" in done.stdout
    assert "40 shapes; error of shapes left out: median" in done.stdout
    assert done.stdout.count("at most 10%: met)") == 2
    assert "MB of keys and values" in done.stdout


def test_shapes_of_equal_latency(tmp_path):
    write_table(synthetic(), tmp_path / "a.json")
    flags = ("--depth=2,6", "--head_dim=16,32", "--ffn_band=0.3", f"--latency={tmp_path}/a.json")
    done = command("experiments.shapes", "--budget=decode_ms:0.5", *flags)
    assert done.returncode == 0, done.stderr
    times = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("decode_ms"))
    assert all(0.49 < float(time) < 0.51 for time in times)
    without = command("experiments.shapes", "--budget=decode_ms:0.5", "--depth=2")
    assert without.returncode == 2
    assert without.stderr.startswith("error: --latency: missing; name the table")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: missing; name the table to make"),
        (["--out=README.md"], "--out=README.md: already exists"),
        (["--out=new.json", "--weights=int8"], "--weights=int8: expected some of float32, bfloat16"),
        (["--out=new.json", "--weights=q4_0"], "--weights=q4_0: expected some of float32, bfloat16"),
        (
            ["--out=new.json", "--program=llama.cpp", "--threads=2"],
            "--threads=2: llama.cpp is measured on one",
        ),
        (["--out=new.json", "--shapes=15"], "latency: 15 shapes for 8 coefficients; measure at least 16"),
        (["--out=new.json", "--slots=100"], "--slots=100: not a power of 2; use 64"),
        (["--out=new.json", "--threads=1000"], "--threads=1000: this process may use"),
        (["--table=README.md"], "README.md: not a table of latency"),
    ],
    ids=str,
)
def test_bad_flags(arguments, message):
    done = command("experiments.latency", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("program", "kinds"), [("ours", ["float32"]), ("llama.cpp", list(LLAMA_CPP))])
def test_the_command_measures_and_fits(program, kinds, tmp_path):
    out = tmp_path / "a.json"
    few = ("--shapes=22", "--megabytes=2", "--slots=32", "--rounds=2")
    done = command("experiments.latency", "--device=this", f"--program={program}", f"--out={out}", *few)
    assert done.returncode == 0, done.stderr
    table = read_table(out)
    assert [len(table.points[kind]) for kind in kinds] == [22] * len(kinds)
    assert table.threads == 1
    assert json.loads(out.read_text())["command"].startswith("python -m experiments.latency")
    assert list(table.fits) == kinds
    assert "error of shapes left out" in done.stdout


def test_a_latency_without_a_table_of_the_type_is_refused():
    with pytest.raises(UserError, match="latency: weights in 'float32' were not measured"):
        Latency({}).predict(tiny_model(), 16)
