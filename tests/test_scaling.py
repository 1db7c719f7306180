"""The command: a study's records become the law's page, figures and findings, however many there are."""

import dataclasses
import re

import pytest
from commands import command, real
from test_results import make_record
from test_shape_law import PHI, grid, simulated, truth

from experiments.reporting import shape_figures, shape_page, shape_tables
from mobilellm_jax.analysis import rate_line
from mobilellm_jax.analysis.cells import Trend, cells_of
from mobilellm_jax.analysis.records import read_record, write_record
from mobilellm_jax.analysis.shape_findings import findings_of
from mobilellm_jax.analysis.shape_law import Form
from mobilellm_jax.errors import UserError

SCIENTIFIC = ["model.depth", "model.width", "model.sharing", "model.num_repeats", "train.steps"]


def records_of(cells, **changes):
    """Records of the seeds of cells, in the layout of a sweep."""
    records = []
    for place, cell in enumerate(cells):
        repeats = max(cell.uses)
        depth = len(cell.uses)
        overrides = {
            "model.depth": depth,
            "model.width": cell.width,
            "model.sharing": cell.order,
            "model.num_repeats": repeats,
            "train.steps": cell.tokens // 1024,
        }
        pairs = [[cell.design, f"{depth} x {cell.width}"]] if not cell.within or repeats > 1 else []
        for seed, loss in enumerate(cell.losses):
            record = make_record(
                score=float(loss),
                seed=seed,
                study="shape_laws",
                preset=cell.preset,
                point=cell.design + (f" ({cell.arm})" if cell.arm == "standard" else ""),
                design=cell.design,
                arm=cell.arm,
                point_index=place,
                scientific=SCIENTIFIC,
                pairs=[],
                x=None,
                overrides={**overrides, "model.parameterization": cell.arm},
                plan={"seeds": 3, "pairs": len(pairs), "sd": None, "power": None, "control": False},
                floor={"tokens": cell.tokens, "unigram": 6.0, "bigram": 5.0, "trigram": 4.5},
                layer_plan=list(range(depth)) * repeats,
                parameters={"total": cell.parameters, "embedding": 0, "non_embedding": cell.parameters},
                tokens_seen=cell.tokens,
                **changes,
            )
            model = {**record.config["model"], "depth": depth, "width": cell.width, "sharing": cell.order}
            model |= {"num_repeats": repeats, "parameterization": cell.arm}
            train = {**record.config["train"], "steps": cell.tokens // 1024}
            config = {**record.config, "model": model, "train": train}
            records.append(dataclasses.replace(record, config=config))
    return records


def study(cells, **changes):
    """Cells with losses of the known law: repeats worth 0.5, 0.3 and 0.4, best D/L 25."""
    return simulated(cells, truth(cells), sd=0.01, **changes)


def written(workdir, records):
    for record in records:
        name = re.sub(r"\W+", "-", f"{record.point}-s{record.seed}")
        write_record(record, workdir / "results" / "shape_laws" / record.preset / f"{name}.json")
    return workdir


def flags(workdir, *more):
    return "experiments.scaling", f"--workdir={workdir}", *more


def test_cells_are_what_the_records_say():
    cells = study(grid(("33k", "100k"), (2, 8), None))
    found, missing = cells_of(records_of(cells))
    key = lambda cell: (cell.preset, cell.design)  # noqa: E731
    assert missing == []
    for ours, theirs in zip(sorted(found, key=key), sorted(cells, key=key), strict=True):
        same = ("size", "arm", "order", "within", "parameters", "uses", "width", "layers", "tokens", "losses")
        assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
        assert ours.horizon == pytest.approx(theirs.horizon, rel=1e-3)
        assert ours.trigram == 4.5


def test_runs_that_diverged_keep_a_cell_out_of_the_law():
    records = records_of(study(grid(("33k", "100k"), (2, 8), None)))
    place = next(i for i, r in enumerate(records) if r.design == "1 x 90")
    records[place] = dataclasses.replace(records[place], status="diverged", error="loss is nan")
    found = findings_of(records, resamples=2)
    (cell,) = [cell for cell in found.cells if cell.diverged]
    assert (cell.design, cell.diverged, len(cell.losses)) == ("1 x 90", 1, 2)
    assert cell not in found.fitted
    said = "\n".join(shape_page.warnings(found))
    assert "100k_2, 1 x 90 (completep): 1 runs diverged; the cell is left out" in said
    assert "100k_2: 1 x 90 has 2 of 3 seeds" in said


@pytest.mark.slow
def test_command_reports_the_law(tmp_path):
    cells = study(grid())
    standard = [dataclasses.replace(c, arm="standard") for c in cells if c.preset == "100k_8"]
    done = real(*flags(written(tmp_path, records_of([*cells, *standard])), "--resamples=40"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reports" / "shape_laws.md").read_text()
    ends = re.search(r"width over layers: [\d.]+ \[([\d.]+), ([\d.]+)\]", done.stdout).groups()
    low, high = map(float, ends)
    assert 0.95 * low < 25 < 1.05 * high < 1.6 * low
    for order, phi in PHI.items():
        interval = re.search(rf"A repeat, {order}: phi = [\d.]+ \[([\d.]+), ([\d.]+)\]", done.stdout)
        low, high = map(float, interval.groups())
        assert low - 0.03 < phi < high + 0.03
    answer = (
        r"\n\nA block used twice counts as [\d.]+ \[[\d., ]+\] blocks and the best width over layers is \d+"
    )
    assert re.search(answer, page)
    assert "300k and 1m are missed by 0.0" in page
    assert "fitted to completep alone; standard (14 cells) is" in page
    assert re.search(r"\d+ of 144 cells are above the loss of a trigram .* at 33k_2, ", page)
    for name in ("differences", "aspects", "repeats"):
        assert f"../figures/shape_laws-{name}.png" in page
        assert 10_000 < (tmp_path / "figures" / f"shape_laws-{name}.png").stat().st_size < 300_000
    assert "No finished run at 1m_2." in page  # unlike 1m_32, it is a preset
    assert (tmp_path / "reports" / "shape_laws.html").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (grid(("33k",), (2,), None)[:1], "No law: cannot fit a law of size to 1 size (33k)"),
        (grid(("33k",), (2, 8, 32), None), "No law: cannot fit a law of size to 1 size (33k)"),
        (grid(("33k", "100k"), (2,), None), "Left out: no term of tokens"),
        ([c for c in grid(("33k", "100k"), (2, 8), None) if c.order == "none"], "Left out: no exponent for"),
        (
            grid(("33k",), (2, 8, 32), None) + grid(("100k",), (2,), None),
            "No finished run at 100k_8, 100k_32",
        ),
    ],
)
def test_a_study_that_has_just_begun_is_reported_as_far_as_it_goes(cells, says):
    found = findings_of(records_of(study(cells)), resamples=4)
    images = [drawn for _, _, drawn in shape_figures.images(found)]
    assert says in "\n".join(shape_page.warnings(found))
    assert shape_page.sections(found, [])
    begins = (
        "The records do not allow a law yet",
        "The best width over layers",
        "A block used twice counts as",
        "On average over horizons that differ, a block used twice counts as",
    )
    assert shape_page.answer(found).startswith(begins)
    assert (images[0] is None) == (len(cells) == 1)
    assert images[1] is not None
    assert shape_page.text(found)


def test_another_form_that_predicts_better_is_named():
    cells = grid()
    cells = simulated(cells, truth(cells, plus=True), sd=0.003)
    found = findings_of(records_of(cells), resamples=2)
    assert 'predicts sizes left out best, "shape as a term of its own"' in shape_page.best_form(found)
    assert found.law.form.shape == "plus"
    assert found.score("one best D/L") > 2 * found.score("shape as a term of its own")


def test_no_records_of_the_study_or_preset(tmp_path):
    done = command(*flags(tmp_path))
    assert done.returncode == 2
    assert "no records of shape_laws; make them with: python -m experiments.sweep" in done.stderr
    written(tmp_path, records_of(study(grid(("33k",), (2,), None))))
    done = command(*flags(tmp_path, "--presets=33k_2,100k_2"))
    assert done.returncode == 2
    assert "no records of shape_laws:100k_2; make them with" in done.stderr
    assert "Traceback" not in done.stderr


def test_presets_that_were_asked_for_are_not_missed(tmp_path):
    written(tmp_path, records_of(study(grid(("33k", "100k"), (2, 8), None))))
    assert "No finished run at 33k_32, 100k_32, 300k_2" in command(*flags(tmp_path, "--resamples=2")).stdout
    asked = command(*flags(tmp_path, "--resamples=2", "--presets=33k_2,33k_8,100k_2"))
    assert asked.returncode == 0, asked.stderr
    assert "No finished run" not in asked.stdout


def test_no_finished_run():
    records = records_of(study(grid(("33k",), (2,), None)[:1]), phase="tuning")
    with pytest.raises(UserError, match="shape_laws: no finished comparison run yet"):
        findings_of(records[:1])


def test_presets_on_other_data_are_refused(tmp_path):
    written(tmp_path, records_of(study(grid(("33k", "100k"), (2,), None))))
    for path in (tmp_path / "results" / "shape_laws" / "100k_2").iterdir():
        record = read_record(path)
        write_record(dataclasses.replace(record, data={**record.data, "source_sha256": "other"}), path)
    done = command(*flags(tmp_path))
    assert done.returncode == 2
    assert "source_sha256 is other in 100k_2 but abababababab in 33k_2" in done.stderr


def test_a_slope_of_what_bends_has_no_interval():
    found = findings_of(records_of(study(grid(("33k", "100k"), (2, 8, 32), None))), resamples=4)
    bent, straight = (
        Trend("completep", "depth", p, "D/L 32", ("33k",), 0.1234, 0.01, float(p), float(p))
        for p in ("1e-9", "0.9")
    )
    page = str(shape_page.sections(dataclasses.replace(found, trends=[bent, straight]), []))
    assert "1 of 2 differences between designs trained on as many tokens change with the horizon" in page
    assert "['+0.1234', '+0.1234 [+0.1134, +0.1334]']" in page
    said = shape_page.answer(dataclasses.replace(found, trends=[bent, straight]))
    assert said.startswith("On average over horizons that differ, ")
    both = dataclasses.replace(found, trends=[bent, dataclasses.replace(bent, label="other"), straight])
    assert "All are from the unshared design of D/L 32: that one" in "\n".join(shape_page.summary(both))
    law = dataclasses.replace(found.law, form=Form("", shape="tokens"))
    assert dataclasses.replace(both, law=law).changing == ([], 0)
    for_more_tokens = dataclasses.replace(bent, equal_tokens=False)  # the law changes too
    said = shape_page.answer(dataclasses.replace(found, trends=[for_more_tokens, straight]))
    assert said.startswith("A block used twice counts as ")


def test_what_a_rate_costs_that_was_not_tuned_is_said():
    """Where the optima of other cells predict it; where they are too few, that is said."""
    found = findings_of(records_of(study(grid(("33k", "100k"), (2, 8, 32), None))), resamples=2)
    assert {cell.untuned_rate for cell in found.cells} == {2e-3}
    said = "\n".join(shape_page.warnings(found))
    assert "Learning rates were not tuned at 33k_2, 33k_8, 33k_32, 100k_2, 100k_8, 100k_32; too few" in said
    cells = [
        cell
        if cell.preset == "100k_32"
        else dataclasses.replace(cell, optimum=-6 - 0.1 * (place % 3), curvature=0.06, untuned_rate=None)
        for place, cell in enumerate(found.cells)
    ]
    line = rate_line.fit(cells)
    found = dataclasses.replace(found, rates=line, cells=cells, fitted=cells)
    said = "\n".join(shape_page.warnings(found))
    assert "not tuned at 100k_32: they are what the optima of other cells predict" in said
    cost = max(line.excess(cell) for cell in cells if cell.untuned_rate)
    assert (
        f"to {line.error:.2f} octaves (root mean square), which is expected to cost up to {cost:.3f}" in said
    )
    page = str(shape_page.sections(found, []))
    assert "'not tuned': ['100k_32'], 'log2 of the rate': ['-8.97']" in page
    assert f"log2 of the best learning rate is {line.at:.3f}" in shape_page.text(found)


def test_what_is_sure_is_listed_by_cell():
    found = findings_of(records_of(study(grid(("33k",), (2, 8, 32), None))), resamples=4)
    of = [d for d in found.differences if d.label == found.differences[0].label]
    sure = [
        dataclasses.replace(d, mean=mean, half_width=0.1)
        for d, mean in zip(of, (-0.2, 0.2, 0.05), strict=True)
    ]
    label = f"{of[0].label} ({of[0].row})"
    assert shape_tables.signs(dataclasses.replace(found, differences=sure)) == [
        (label, ["33k_2"], ["33k_8"], ["33k_32"])
    ]
