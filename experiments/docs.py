"""Write the parts of the documentation that are made from code and records, and gather the pages of its site.

  python -m experiments.docs                                # brings the pages in docs/ up to date
  python -m experiments.docs && zensical build --strict     # the site, in site/; pip install -e '.[docs]'
  python -m experiments.docs && zensical serve              # the same, at http://localhost:8000
  python -m experiments.docs --notebook                     # docs/explore.ipynb anew, with outputs

Made from code and records are the reference of the config (its dataclasses and `configs/base.py`), the tables
of the performance page (`experiments/bench/`) and the picture of the layer plans. All pages, with reports and
figures, go to `build/docs`. A link to a file that is no page becomes one to the repository, `repo_url` in
`mkdocs.yml`.
"""

import json
import shutil
from typing import Any

import yaml
from absl import flags

from experiments import cli
from experiments.benchmarks import measure
from experiments.cli import ROOT
from experiments.reporting import reference, site
from mobilellm_jax.errors import UserError, of_extra

_NOBODY = "/OWNER/"  # stands in mkdocs.yml until a copy has an address


def main() -> int:
    """Writes the pages, and returns the exit status."""
    if not (ROOT / "mkdocs.yml").is_file():
        raise UserError(f"{ROOT}: no mkdocs.yml there; run the command in a checkout of the repository")
    for name, text in made().items():
        (ROOT / name).write_text(text, encoding="utf-8")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    target = ROOT / settings["docs_dir"]
    shutil.rmtree(target, ignore_errors=True)
    pages = site.gather(ROOT, target, settings["repo_url"])
    if flags.FLAGS.notebook:
        print(f"{_execute()}: made from its text, and executed")
    if _NOBODY in settings["repo_url"]:
        print(f"warning: links to code lead to {settings['repo_url']}; set repo_url in mkdocs.yml")
    print(f"{len(pages)} pages in {target.relative_to(ROOT)}; to build the site: zensical build --strict")
    return 0


def made() -> dict[str, str]:
    """The files that are made wholly or in part, by path, as they should be."""
    benchmarks = [json.loads(path.read_text()) for path in sorted(ROOT.glob("experiments/bench/*/*.json"))]
    tables = [line for record in benchmarks for line in _section(record)]
    parts = {
        "docs/reference/configuration.md": ("fields", reference.configuration()),
        "docs/performance.md": ("tables", "\n".join(tables)),
    }
    texts = {
        name: site.fill((ROOT / name).read_text(encoding="utf-8"), part, content)
        for name, (part, content) in parts.items()
    }
    return {**texts, "docs/assets/layer_plans.svg": reference.layer_plans()}


def _section(record: dict[str, Any]) -> list[str]:
    """The table of a part of the benchmark, with a heading and a line for the machine."""
    _, title, *table = measure.table(record)
    platform = record["device"]["platform"].upper()
    return [
        f"### {measure.titled(record)}, {platform}",
        "",
        f"Measured on {title.partition(': ')[2]}.",
        *table,
        "",
    ]


def _execute() -> str:
    """Runs docs/explore.py as a notebook, and writes docs/explore.ipynb with what it shows.

    Sliders are left out, which are dead without a kernel.
    """
    jupytext, nbclient = (
        of_extra("jupytext", "test", "--notebook"),
        of_extra("nbclient", "notebook", "--notebook"),
    )
    name = "docs/explore"
    notebook = jupytext.read(ROOT / f"{name}.py")
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place}"  # not drawn at random
    resources = {"metadata": {"path": str(ROOT / "docs")}}
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources=resources, record_timing=False
    )
    client.execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "sliders" in cell.metadata.get("tags", ()):
            cell.outputs = []
    jupytext.write(notebook, ROOT / f"{name}.ipynb", fmt="ipynb")
    return f"{name}.ipynb"


def _define_flags() -> None:
    flags.DEFINE_bool("notebook", False, "make docs/explore.ipynb anew as well; takes minutes")


if __name__ == "__main__":
    cli.run(main, define_flags=_define_flags)
