"""The console command: `mobilellm train ...` is `python -m experiments.train ...`, from any folder.

  mobilellm -h          # the commands
  mobilellm train -h    # the flags of one
  mobilellm --version

The commands and configs are those of the checkout that is installed. Paths are relative to the current
folder; a config file that does not exist there is taken from the checkout.
"""

import ast
import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

from mobilellm_jax.errors import did_you_mean

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Runs the command that is named first; returns the exit status, unless the command exits itself."""
    name, *arguments = sys.argv[1:] or ["-h"]
    known = {
        path.stem: path for path in sorted((ROOT / "experiments").glob("[!_]*.py")) if path.stem != "cli"
    }
    if not known:
        return _refuse(
            f"{ROOT}: holds no experiments/; install a checkout of the repository by pip install -e ."
        )
    if name in ("-h", "--help"):
        width = max(map(len, known))
        print("usage: mobilellm <command> --flag=value ...\n")
        print("\n".join(f"  {command:{width}}  {_summary(path)}" for command, path in known.items()))
        print("\nmobilellm <command> -h lists the flags of a command.")
        return 0
    if name == "--version":
        print(f"mobilellm_jax {importlib.metadata.version('mobilellm_jax')}")
        return 0
    if name not in known:
        return _refuse(f"{name}: no such command; {did_you_mean(name, known)}")
    sys.path.insert(0, str(ROOT))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the processes that a command starts
    sys.argv = [f"mobilellm {name}", *arguments]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    return 0


def _summary(path: Path) -> str:
    """The first line of the documentation of a module, which is not imported."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
