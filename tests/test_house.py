"""The rules of the house: who imports whom, short files, formatted, linted and type-checked code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY, CONFIGS, EXPERIMENTS = (
    sorted((ROOT / name).rglob("*.py")) for name in ("mobilellm_jax", "configs", "experiments")
)
OURS = ("mobilellm_jax", "configs", "experiments")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Returns the dotted names that a file imports: "a.b" and "a.b.c" for `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def all_imports(path: Path, seen: set[Path] | None = None) -> set[str]:
    """Returns the imports of a file and of every file of ours that it imports."""
    seen = set() if seen is None else seen
    seen.add(path)
    found = imports(path)
    for name in sorted(found):
        parts = name.split(".")
        if parts[0] in OURS:
            for depth in range(1, len(parts) + 1):
                stem = ROOT.joinpath(*parts[:depth])
                for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                    if file.is_file() and file not in seen:
                        found |= all_imports(file, seen)
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_imports_neither_configs_nor_experiments(path):
    assert packages(path).isdisjoint({"configs", "experiments"})


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configs_import_configs_only(path):
    assert packages(path) <= {"configs", "ml_collections", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "name",
    [
        f"experiments/{name}.py"
        for name in ("figures", "beside_paper", "drawing", "gallery", "claims", "tables", "report")
    ]
    + [f"mobilellm_jax/{name}.py" for name in ("results", "statistics", "verdicts")],
)
def test_reading_results_imports_no_jax(name):
    """Nor does anything that these files import."""
    found = {module.split(".")[0] for module in all_imports(ROOT / name)}
    assert found.isdisjoint({"jax", "jaxlib", "flax", "optax", "orbax", "grain"})


def test_model_and_partition_meet_only_through_axis_names():
    assert "mobilellm_jax.partition" not in imports(ROOT / "mobilellm_jax/model.py")
    assert "mobilellm_jax.model" not in imports(ROOT / "mobilellm_jax/partition.py")


@pytest.mark.parametrize("path", LIBRARY + CONFIGS + EXPERIMENTS, ids=name_of)
def test_no_second_default(path):
    """`config.get(key, default)` would hide a default outside `configs/base.py`."""
    assert not re.search(r"\bconfig\w*(\.\w+)*\.get\([^)]*,", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS, ids=name_of)
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


TOOLS = {
    "format": ["ruff", "format", "--check"],
    "lint": ["ruff", "check"],
    "types": ["pyright", "--pythonpath", sys.executable],  # else it looks at the first Python on PATH
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool(tool):
    result = subprocess.run([sys.executable, "-m", *TOOLS[tool]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
