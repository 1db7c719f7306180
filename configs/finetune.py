"""Training that goes on from a run, trained or imported, on its own data or on other data.

  python -m experiments.train --config=configs/finetune.py:runs/first --workdir=runs/more
  python -m experiments.train --config=configs/finetune.py:runs/smollm2 --workdir=runs/stories
 --config.data.source=files:'stories/*.jsonl' --config.optimizer.learning_rate=2e-4

The preset is the directory of the run. Its model, tokenizer, length of rows, data, optimizer and batch are
the defaults; an imported run has those of `base.py` where it has no values of its own.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base


def get_config(preset: str = "") -> ConfigDict:
    """Config of a run that starts from the run in the directory `preset`."""
    if not preset:
        raise ValueError("name the run to start from, such as configs/finetune.py:runs/first")
    config, run = base.get_config(), Path(preset).expanduser()
    there = _read(run / "config.json", f"{preset} is not the directory of a run")
    config.train.init_from = preset
    for group in ("model", "data", "optimizer", "train"):
        for name, value in there[group].items():
            if name in config[group] and (group != "train" or name in ("batch_size", "accumulation_steps")):
                config[group][name] = value
    if there["data"]["source"] == "imported":
        config.data.source = base.get_config().data.source
    if (run / "tokenizer").is_dir():
        config.data.tokenizer = _tokenizer(run / "tokenizer")
    return config


def _tokenizer(folder: Path) -> str:
    """The spec of the tokenizer that a run keeps."""
    spec = _read(folder / "card.json", f"the tokenizer in {folder} is not complete")["tokenizer"]
    kind = spec.partition(":")[0]
    if kind == "bytes":
        return spec
    return (
        f"sentencepiece:{folder}/tokenizer.model"
        if kind == "sentencepiece"
        else f"huggingface:{folder}/tokenizer.json"
    )


def _read(path: Path, problem: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{problem}: {path.name}: {error}") from None
