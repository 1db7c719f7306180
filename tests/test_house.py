"""The rules of the house: who imports whom, short files, formatted, linted and type-checked code."""

import ast
import functools
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


@functools.cache
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


# Room -> layer. A room imports rooms of lower layers only; rooms of one layer never import each other.
LAYERS = {
    "mobilellm_jax": [
        ["errors"],
        ["validation", "sharing", "roles"],
        ["train_config", "uses_config"],  # parts of the config
        ["config"],
        ["parameters", "chunks", "dtypes", "loops"],
        ["model", "parallel"],  # they meet through the names of mesh axes
        ["storage", "costs", "quantization"],
        ["data", "analysis"],
        ["training", "inference"],
        ["runs", "diagnostics"],
        ["formats"],
        ["__main__"],  # starts the commands, and imports next to nothing
    ],
    "experiments": [["cli"], ["reporting"], ["runner"], ["commands"]],
}
BESIDE_COMMANDS = {"benchmarks"}  # the parts of one command, `experiments.bench`


def room(package: str, dotted: str) -> str | None:
    """The room of a dotted name: the part after the package; all commands are one room."""
    first, _, rest = dotted.partition(".")
    name = rest.partition(".")[0]
    if first != package or not name:
        return None
    known = {room for layer in LAYERS[package] for room in layer}
    return name if name in known or package == "mobilellm_jax" else "commands"


@pytest.mark.parametrize("package", LAYERS)
def test_arrows_point_downwards(package):
    layer_of = {name: layer for layer, names in enumerate(LAYERS[package]) for name in names}
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] == "__init__" or BESIDE_COMMANDS & set(parts):
            continue
        here = room(package, ".".join(parts))
        assert here in layer_of, f"{name_of(path)}: give its room a layer in LAYERS"
        for name in sorted(imports(path)):
            there = room(package, name)
            if there is None or there == here or {*name.split(".")} & BESIDE_COMMANDS:
                continue
            if there not in layer_of or layer_of[there] >= layer_of[here]:
                wrong.append(f"{name_of(path)} -> {name}")
    assert not wrong


def test_commands_do_not_import_each_other():
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__", "cli"}
    wrong = {
        f"{name} -> {other}"
        for name in commands
        for other in commands - {name}
        if f"experiments.{other}" in imports(ROOT / f"experiments/{name}.py")
    }
    assert not wrong


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS, ids=name_of)
def test_imports_set_nothing(path):
    """Neither log levels nor variables; `storage/quiet.py` does so when a command starts."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            assert ast.unparse(statement.value.func).endswith(".defvjp")
        if isinstance(statement, ast.Assign):
            assert all(isinstance(target, ast.Name | ast.Tuple) for target in statement.targets)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_flags_are_defined_in_functions(path):
    """`cli.run` calls them, so that any two commands can be imported into one process."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If):  # an if: run as a command
            assert "flags.DEFINE_" not in ast.unparse(statement)


@pytest.mark.slow
def test_all_commands_can_be_imported_into_one_process():
    commands = [f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("[!_]*.py")]
    code = (
        f"import importlib; from absl import flags; [importlib.import_module(name) for name in {commands}]; "
        "print([name for name in flags.FLAGS.flags_by_module_dict() if name.startswith('experiments')])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


READING_RECORDS = [
    path
    for path in LIBRARY + EXPERIMENTS
    if {"analysis", "reporting"} & set(path.parts) or path.name in ("report.py", "scaling.py")
]


@pytest.mark.parametrize("path", READING_RECORDS, ids=name_of)
def test_reading_records_imports_no_jax(path):
    """Nor does anything that these files import."""
    found = {module.split(".")[0] for module in all_imports(path)}
    assert found.isdisjoint({"jax", "jaxlib", "flax", "optax", "orbax", "grain"})


@pytest.mark.parametrize("path", LIBRARY + CONFIGS + EXPERIMENTS, ids=name_of)
def test_no_second_default(path):
    """`config.get(key, default)` would hide a default outside `configs/base.py`."""
    assert not re.search(r"\bconfig\w*(\.\w+)*\.get\([^)]*,", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS, ids=name_of)
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


TRAINING = [path for path in LIBRARY if path.parent.name == "training"]


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_functions_of_training_fit_on_a_screen(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


TOOLS = {
    "format": ["ruff", "format", "--check"],
    "lint": ["ruff", "check"],
    "types": ["pyright", "--pythonpath", sys.executable],  # else it looks at the first Python on PATH
}


@pytest.mark.parametrize("tool", ["format", "lint", pytest.param("types", marks=pytest.mark.slow)])
def test_tool(tool):
    result = subprocess.run([sys.executable, "-m", *TOOLS[tool]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
