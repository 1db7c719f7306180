# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A look around `mobilellm_jax`
#
# What shape should a small language model have? This notebook draws layer plans, counts what they cost,
# trains two tiny models, and reads what the committed studies found, beside what
# [MobileLLM](https://arxiv.org/abs/2402.14905) printed. On one CPU core all of it takes about a minute;
# what it writes goes to a temporary folder.
#
# Changes are made in its text twin: edit `docs/explore.py`, then run `python -m experiments.docs --notebook`.

# %% [markdown]
# ## 1. Install
#
# In a checkout that is installed this only finds the root folder. Elsewhere, as in Colab, set `REPOSITORY` to
# the copy on GitHub that this notebook comes from, as `owner/name`: the cell clones and installs it, which
# takes a few minutes. A GPU is used if there is one. If Colab then asks to restart the session, do so, and
# start again from here.

# %%
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("REPOSITORY", "")  # @param {type: "string"}


def works(code):
    """Whether a new Python runs the code."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def install(extra):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f".[{extra}]"], check=True)


here = Path.cwd()
places = [here, *here.parents, here / "mobilellm_jax"]
root = next((place for place in places if (place / "mobilellm_jax/sharing.py").is_file()), None)
cloned = root is None
if root is None:
    if not REPOSITORY:
        raise ValueError("REPOSITORY: set it to owner/name of the copy on GitHub to install from")
    root = here / "mobilellm_jax"
    address = f"https://github.com/{REPOSITORY}"
    subprocess.run(["git", "clone", "--depth=1", address, root], check=True)
os.chdir(root)
sys.path.insert(0, str(root))
if cloned or not works("import ipywidgets, pandas, mobilellm_jax.training.loop"):
    install("notebook")
if shutil.which("nvidia-smi") and not works("import jax; assert jax.default_backend() == 'gpu'"):
    install("cuda")

# %% [markdown]
# The rest imports from three places: the library, `configs` (what to run) and `experiments` (figures, tables
# and the paper's numbers).

# %%
import math
import tempfile
import textwrap

import jax
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image, display
from ipywidgets import interact

from configs import base, layer_sharing
from experiments.reporting import beside_paper, drawing, tables
from mobilellm_jax import data
from mobilellm_jax.analysis.records import budget_name, read_records
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.run import check
from mobilellm_jax.sharing import STRATEGIES, layer_plan
from mobilellm_jax.training.loop import train

plt.style.use(drawing.STYLE | {"figure.dpi": 90})
print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## 2. Layer plans
#
# A model is a stack of *blocks* (weights) and a *layer plan*: the order in which blocks are applied. Equal
# colours are equal weights.


# %%
def draw_plans(depth=4, num_repeats=2, own_plan="0 1 2 1 2 3"):
    """One row for each strategy, one box for each layer applied."""
    names = [*STRATEGIES, own_plan]
    _, axes = plt.subplots(figsize=(9, 2.8))
    for row, name in enumerate(names):
        once = name not in STRATEGIES or name == "none"  # these have no repeats
        try:
            plan = layer_plan(name, depth, 1 if once else num_repeats)
        except UserError as error:
            axes.text(0.05, row, textwrap.fill(str(error), 95), va="center", fontsize=9)
            continue
        for layer, block in enumerate(plan):
            shade = block / max(depth - 1, 1)
            axes.barh(row, 0.9, left=layer, color=plt.get_cmap("cividis")(shade))
            axes.text(
                layer + 0.45, row, str(block), ha="center", va="center", color="w" if shade < 0.6 else "k"
            )
    axes.set_yticks(range(len(names)), [*STRATEGIES, "own plan"])
    axes.set(xlim=(0, max(8, depth * num_repeats, len(own_plan.split()))), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel("layers applied, from input to output")
    axes.grid(visible=False)
    plt.show()


draw_plans()

# %% [markdown]
# Move the sliders, or write a plan of your own; where a combination means nothing, the library says why.

# %% tags=["sliders"]
_ = interact(draw_plans, depth=(1, 8), num_repeats=(1, 4))

# %% [markdown]
# ## 3. What a shape costs
#
# All of this follows from the config, before anything is allocated. Sharing buys layers without parameters,
# but not without FLOPs: compare the two columns. The bytes read for each decoded token show why the paper
# prefers `immediate`: a block that is used twice in a row is read once.


# %%
def budgets(fields):
    """Costs of a shape by name, for rows of 2,048 tokens."""
    config = base.update(base.get_config(), {f"model.{name}": value for name, value in fields.items()})
    costs = accounting.budgets(from_config_dict(config).model, length=2048, rows=1)
    return {budget_name(name): tables.quantity(value) for name, value in costs.items()}


def show_budgets(
    depth=30,
    width=576,
    num_heads=9,
    num_kv_heads=3,
    sharing="immediate",
    num_repeats=2,
    share_embedding=True,
):
    """The shape beside the same blocks without sharing. It starts with the paper's MobileLLM-LS-125M."""
    fields = {**locals(), "vocab_size": 32_000, "compute_dtype": "bfloat16"}
    try:
        columns = {
            f"{sharing} x{num_repeats}": budgets(fields),
            "each block once": budgets({**fields, "sharing": "none", "num_repeats": 1}),
        }
        display(pd.DataFrame(columns))
    except UserError as error:
        print(error)


show_budgets()

# %% tags=["sliders"]
SLIDERS = {
    "depth": (1, 64),
    "width": (64, 1280, 64),
    "num_heads": (1, 20),
    "num_kv_heads": (1, 20),
    "sharing": list(STRATEGIES),
    "num_repeats": (1, 4),
}
_ = interact(show_budgets, **SLIDERS)
# %% [markdown]
# ## 4. Train two models
#
# Three blocks of width 56 learn to predict English that ships with Python. The first model applies each block
# once, the second twice in a row: equally many parameters, almost twice
# the FLOPs per token.

# %%
MODELS = {"none": 1, "immediate": 2}  # sharing: times each block is applied
STEPS = 120
scratch = tempfile.TemporaryDirectory()


def train_tiny(sharing, num_repeats):
    """Returns the `train.Outcome` of the tiny layer-sharing model after a few steps."""
    overrides = {
        "model.sharing": sharing,
        "model.num_repeats": num_repeats,
        "data.cache_dir": f"{scratch.name}/cache",
        "optimizer.warmup_steps": STEPS // 4,
        "train.steps": STEPS,
        "train.eval_every": STEPS // 4,
        "train.log_every": STEPS // 30,
    }
    run = from_config_dict(base.update(layer_sharing.get_config("tiny"), overrides))
    prepared = data.prepare(run.data, run.model.vocab_size)
    workdir = Path(tempfile.mkdtemp(dir=scratch.name))  # empty, so that nothing old is resumed
    return train(run, prepared, check(run), workdir, say=lambda line: None)


outcomes = {}
for sharing, num_repeats in MODELS.items():
    outcomes[sharing] = train_tiny(sharing, num_repeats)
    final = outcomes[sharing].evaluations[-1]["loss"]
    print(f"{sharing}: held-out loss {final:.3f} nats per token, {outcomes[sharing].wall_s:.0f} s")

# %% [markdown]
# Thin lines are the batches they train on, markers are text they never train on. A model that guesses evenly
# among the 512 tokens of its vocabulary has a loss of ln 512 = 6.24.

# %%
_, axes = plt.subplots(figsize=(9, 4))
for index, (sharing, outcome) in enumerate(outcomes.items()):
    color = drawing.COLORS[index]
    axes.plot(*zip(*outcome.train_curve, strict=True), color=color, lw=0.8, alpha=0.6)
    steps = [evaluation["step"] for evaluation in outcome.evaluations]
    losses = [evaluation["loss"] for evaluation in outcome.evaluations]
    look = {"marker": drawing.MARKERS[index], "ls": drawing.DASHES[index], "color": color}
    axes.plot(steps, losses, **look, label=f"{sharing}, held-out text")
axes.axhline(math.log(512), color="0.5", ls=":", label="guessing evenly")
axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# **What this cannot show.** It is one seed, at one learning rate that was tuned for neither model, and 61,000
# tokens; the paper's ablations see four million times more. Which line is lower says how fast these two
# start, not how good they become, and another seed may well turn a small difference around. The studies below
# tune the learning rate of every point and repeat it with five seeds, and still speak of their own size only.

# %% [markdown]
# ## 5. The paper beside our records
#
# Table 2 of the paper asks which way of sharing is best. Above: the paper's average zero-shot accuracy, one
# run for each point. Below: our tiny twin of that study, mean loss over seeds with its 95 % interval. Units
# and scales differ: compare the *order*, not the numbers.

# %%
study = study_of(read_records("experiments/results/layer_sharing/tiny"))
display(Image(drawing.render(beside_paper.draw(study))))

# %% [markdown]
# The same in words, with what a sceptic should know first. Every study's report begins like this.

# %%
for line in [study.verdict.sentence, *(f"Warning: {warning}" for warning in study.verdict.warnings)]:
    print(textwrap.fill(line, 100))

# %% [markdown]
# ## 6. Records as a data frame
#
# Every run leaves one JSON record with its config, data, curves and timing. Here is one row for each run of
# the tiny study of depth against width.

# %%
runs = pd.DataFrame(
    {
        "point": record.point,
        "seed": record.seed,
        "phase": record.phase,
        "learning rate": record.learning_rate,
        "loss": record.final["loss"] if record.final else None,
        "parameters": record.parameters["non_embedding"],
        "FLOPs per token": record.budgets["train_flops_per_token"],
    }
    for record in read_records("experiments/results/depth_vs_width/tiny")
)
display(runs.sample(5, random_state=0))

# %% [markdown]
# Tuning runs look for a learning rate and have seeds of their own; comparison runs alone decide. Group the
# latter by point:

# %%
compared = runs[runs["phase"] == "comparison"].groupby("point", sort=False)
losses = compared["loss"].agg(["count", "mean", "std"])
display(losses.join(compared[["learning rate", "parameters"]].first()))

# %% [markdown]
# **From here.** `python -m experiments.sweep` runs whole studies, `configs/` says which there are, and the
# reports are in `experiments/reports/`.
