"""Tables and figures from synthetic records: what they show, the same bytes twice, and no jax."""

import csv
import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_results import make_diverged, make_record

from experiments import figures, tables
from mobilellm_jax import results
from mobilellm_jax.errors import UserError
from mobilellm_jax.statistics import verdict

ROOT = Path(__file__).parents[1]
JITTER = {0: 0.0, 1: 0.013, 2: -0.008}


def depths(seeds: int = 3, **changes):
    """A study with a numeric, logarithmic x axis."""
    return [
        make_record(depth=depth, seed=seed, loss=loss + JITTER[seed] * (1 + 0.3 * i), **changes)
        for i, (depth, loss) in enumerate({2: 3.62, 4: 3.55, 8: 3.53, 16: 3.54}.items())
        for seed in range(seeds)
    ]


def strategies(count: int = 4):
    """A study with a categorical x axis and a baseline."""
    names = ["none", "immediate", "repeat_all", "reverse", "0 1 2 1 2 3", "0 1 1 0", "0 0 1 1 2 2"][:count]
    return [
        make_record(
            study="sharing",
            seed=seed,
            loss=3.6 - 0.02 * i + JITTER[seed] * (1 + 0.3 * i),
            point=name,
            point_index=i,
            overrides={"model.sharing": name},
            scientific=["model.sharing"],
            x=None,
            baseline="none",
        )
        for i, name in enumerate(names)
        for seed in range(3)
    ]


def panels(records):
    return figures.draw(records, verdict(records)).axes


def run_command(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.figures", *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_report_writes_four_files_and_returns_tables_and_verdict(tmp_path):
    text = figures.report(depths(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f"shape-tiny.{suffix}" for suffix in ("csv", "md", "png", "svg")]
    assert "'8 x 128' has the lowest mean held-out loss" in text
    assert text.startswith(
        "Does depth or width help more?\nHeld equal: non-embedding parameters within 2 %.\n"
    )
    assert max(map(len, text.splitlines())) <= 120
    page = (tmp_path / "shape-tiny.md").read_text()
    assert "![Does depth or width help more?](shape-tiny.png)" in page
    assert "    python -m experiments.sweep --config=configs/shape.py:tiny" in page
    assert verdict(depths()).sentence in page
    with Image.open(tmp_path / "shape-tiny.png") as image:
        assert image.size == (1380, 780)
    assert (tmp_path / "shape-tiny.png").stat().st_size < 150_000


def test_numeric_axis_shows_means_intervals_and_every_seed():
    records = depths()
    left, right = panels(records)
    assert left.get_xlabel() == "depth (layers)"
    assert left.get_xscale() == "log"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["2", "4", "8", "16"]
    found = verdict(records)
    means = [container[0].get_xydata()[0].tolist() for container in left.containers]
    assert means == [[float(d), found.estimates[f"{d} x 128"].mean] for d in (2, 4, 8, 16)]
    bars = [container[2][0].get_segments()[0][:, 1] for container in left.containers]
    assert [(high - low) / 2 for low, high in bars] == pytest.approx(
        [estimate.half_width for estimate in found.estimates.values()]
    )
    dots = [line.get_ydata() for line in left.lines if line.get_marker() == "."]
    assert sorted(loss for losses in dots for loss in losses) == sorted(record.loss for record in records)
    assert left.get_ylabel() == "final held-out loss (nats per token)"
    assert right.get_ylabel() == "held-out loss (nats per token)"
    assert right.get_xlabel() == "training tokens seen"


def test_curves_are_means_over_seeds_against_tokens():
    records = depths()
    _, right = panels(records)
    thick = [line for line in right.lines if not line.get_label().startswith("_")]
    thin = [line for line in right.lines if line.get_label().startswith("_")]
    assert [line.get_label() for line in thick] == ["2 x 128", "4 x 128", "8 x 128", "16 x 128"]
    assert len(thin) == len(records)
    assert thick[0].get_xdata()[-1] == records[0].tokens_seen
    assert thick[0].get_ydata()[-1] == pytest.approx(verdict(records).estimates["2 x 128"].mean)
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in thick}
    assert len(looks) == len({marker for _, marker, _ in looks}) == 4


def test_categories_stand_in_study_order():
    left, _ = panels(strategies())
    assert [tick.get_text() for tick in left.get_xticklabels()] == [
        "none",
        "immediate",
        "repeat_all",
        "reverse",
    ]
    assert left.get_xscale() == "linear"
    assert panels(strategies(7))[0].get_xticklabels()[0].get_rotation() == 30


def test_one_seed_draws_no_interval(tmp_path):
    left, _ = panels(depths(seeds=1))
    assert [container[2] for container in left.containers] == [()] * 4
    assert left.get_title() == "no intervals: one seed"
    assert "One seed proves nothing" in figures.report(depths(seeds=1), tmp_path)


def test_runs_that_did_not_finish_are_marked(tmp_path):
    records = depths()
    records[-1] = make_diverged(depth=16, seed=2)
    records[:3] = [
        make_record(depth=2, seed=s, status="failed", error="killed", final=None) for s in range(3)
    ]
    left, right = panels(records)
    assert [text.get_text() for text in left.texts] == ["3 of 3 failed", "1 of 3 diverged"]
    assert [line.get_xdata()[0] for line in left.lines if line.get_marker() == "x"] == [2, 16]
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend == ["2 x 128 (3 of 3 failed)", "4 x 128", "8 x 128", "16 x 128 (1 of 3 diverged)"]
    text = figures.report(records, tmp_path)
    assert re.search(r"^2 x 128 +0/3 +none", text, re.MULTILINE)
    assert re.search(r"^16 x 128 +2/3 ", text, re.MULTILINE)


def test_study_in_which_nothing_finished_is_drawn(tmp_path):
    records = [make_diverged(depth=d) for d in (2, 4)]
    assert panels(records)[0].get_title() == "no run finished"
    text = figures.report(records, tmp_path)
    assert "No run finished. 2 of 2 runs diverged" in text


def test_table_has_budgets_differences_and_constants_once():
    records = strategies()
    text = tables.text(records, verdict(records))
    head, outcomes = text.split("\n\n")  # no table of designs: they differ in the order of layers only
    constants = " ".join(head.split("The same for all points:")[1].split())
    assert constants.startswith(
        "blocks 4, layers 4, width 128, heads 4, kv heads 2, ffn 256, parameters 1,000,004,"
    )
    assert constants.endswith("non-embedding 750,004, train FLOPs/token 6.3 M, tokens 2.05 M.")
    points = [re.split("  +", line)[0] for line in outcomes.splitlines()]
    assert points == ["point", "none", "immediate", "repeat_all", "reverse"]
    assert max(map(len, text.splitlines())) <= 120
    assert "against the baseline" in text
    assert outcomes.splitlines()[1].endswith("  baseline")
    row = next(line for line in text.splitlines() if line.startswith("repeat_all  "))
    found = verdict(records).comparisons["repeat_all"]
    assert row.split()[1] == "3/3"
    assert row.endswith(found.word)
    assert f"{found.difference.mean:+.4f} [{found.difference.low:+.4f}, {found.difference.high:+.4f}]" in row


def test_deviation_is_from_the_first_point():
    counts = {2: 1_000_000, 4: 1_012_345, 8: 990_000}
    records = [
        make_record(depth=d, parameters={"total": 2_000_000, "embedding": 0, "non_embedding": n})
        for d, n in counts.items()
    ]
    design = tables.text(records, verdict(records)).split("\n\n")[1]
    assert [line.split()[-2:] for line in design.splitlines()[1:]] == [
        ["+0.00", "%"],
        ["+1.23", "%"],
        ["-1.00", "%"],
    ]


def test_csv_has_full_precision():
    records = depths()
    found = verdict(records)
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(records, found))))
    assert [row["point"] for row in rows] == ["2 x 128", "4 x 128", "8 x 128", "16 x 128"]
    assert float(rows[0]["loss_mean"]) == found.estimates["2 x 128"].mean
    assert float(rows[0]["difference_low"]) == found.comparisons["2 x 128"].difference.low
    assert float(rows[0]["holm_p_value"]) == found.comparisons["2 x 128"].holm_p
    assert rows[2]["difference"] == ""
    assert rows[2]["reference"] == "8 x 128"
    assert rows[0]["parameters_total"] == "1000002"
    assert rows[0]["runs_finished"] == "3"


def test_markdown_escapes_the_column_separator():
    record = make_record(point="a|b")
    assert "| a\\|b | 4 | 4 |" in tables.markdown([record], verdict([record]))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (12, "12"), (999.9, "1 k"), (2_048_000, "2.05 M"), (999_600, "1 M"), (6.3e18, "6.3 E")],
)
def test_quantity(number, text):
    assert tables.quantity(number) == text


def test_warnings_stand_first_and_in_the_figure(tmp_path):
    records = depths()
    records[0] = dataclasses.replace(records[0], git_commit="fedcba9")
    text = figures.report(records, tmp_path)
    assert text.startswith("Warning: The runs differ in git commit: fedcba9 (1 runs), 0123abc (11 runs).")
    assert "Warning: The runs differ in git" in figures.draw(records, verdict(records)).texts[0].get_text()
    assert (tmp_path / "shape-tiny.md").read_text().startswith("# shape-tiny\n\nWarning: The runs differ")


def test_caption_states_the_scale():
    records = depths()
    caption = figures.draw(records, verdict(records)).texts[0].get_text().replace("\n", " ")
    assert caption == (
        "1 M parameters (750 k non-embedding); 2.05 M training tokens; data: bundled (sha256 abababab); "
        "3 seeds; held equal: non-embedding parameters within 2 %; device: 1 x cpu (cpu)."
    )


def test_same_records_give_the_same_bytes(tmp_path):
    records = depths(seeds=2)
    for i, record in enumerate(reversed(records)):
        results.write(record, tmp_path / "results" / record.study / f"{i}.json")
    done = run_command(f"--workdir={tmp_path}", PYTHONHASHSEED="1", TZ="Asia/Tokyo")
    assert done.returncode == 0, done.stderr
    text = figures.report(records, tmp_path / "again")
    assert text.replace(str(tmp_path / "again"), str(tmp_path / "figures")) in done.stdout
    for suffix in ("png", "svg", "csv", "md"):
        once, again = (tmp_path / place / f"shape-tiny.{suffix}" for place in ("figures", "again"))
        assert once.read_bytes() == again.read_bytes(), suffix


def test_figures_are_drawn_without_jax():
    code = "import sys, experiments.figures as _; print({'jax', 'matplotlib.pyplot'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_command_without_records_says_how_to_make_them(tmp_path):
    done = run_command(f"--workdir={tmp_path / 'nowhere'}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        f"error: {tmp_path}/nowhere/results: no records of runs (*.json); "
        f"make some with: python -m experiments.sweep --workdir={tmp_path}/nowhere"
    )


def test_damaged_record_is_refused(tmp_path):
    results.write(make_record(), tmp_path / "results" / "good.json")
    (tmp_path / "results" / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"results/bad\.json: not a readable JSON record"):
        figures.redraw(tmp_path)
    assert not (tmp_path / "figures").exists()


def test_study_that_cannot_be_compared_does_not_stop_the_others(tmp_path, capsys):
    for name, record in {
        "a": make_record(study="a", seed=0),
        "b": make_record(study="a", seed=1, steps=3),
        "c": make_record(study="b"),
    }.items():
        results.write(record, tmp_path / "results" / f"{name}.json")
    with pytest.raises(UserError, match="a:tiny: steps is 500"):
        figures.redraw(tmp_path)
    assert (tmp_path / "figures" / "b-tiny.png").exists()
    assert not (tmp_path / "figures" / "a-tiny.png").exists()
    assert "Only '4 x 128' finished" in capsys.readouterr().out
