"""The directory of a run: config, data card and tokenizer, and the checks before a resume. Without jax."""

import json
from collections.abc import Iterator
from typing import Any

from mobilellm_jax import data
from mobilellm_jax.analysis.comparable import data_changes, leakage
from mobilellm_jax.config import BEFORE, RESUMABLE, Config, flatten, from_config_dict, to_dict
from mobilellm_jax.data.splits import BY_PLACE, HELD_OUT
from mobilellm_jax.data.tokenizers import adds_bos
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath, reason, write_atomically
from mobilellm_jax.storage.sealed import parse, seal, unseal, unseal_if_sealed

DATA = "data.json"  # in a run directory: the data card
IMPORTED = "imported.json"  # in a run directory whose weights were imported
TOKENIZER = "tokenizer"  # folder of a run directory, written by `data.save_tokenizer`


def check_workdir(workdir: AnyPath, config: Config) -> list[str]:
    """Checks that `workdir` has no checkpoint of a run with another config.

    Returns:
      The allowed differences, see `check_same`.

    Raises:
      UserError: it has one.
    """
    if not any(workdir.glob("checkpoints/*")):  # without checkpoints, there is nothing to lose
        return []
    path = workdir / "config.json"
    return check_same(path, read_config(path), config)


def claim_workdir(workdir: AnyPath, config: Config) -> list[str]:
    """Creates `workdir` and writes `config.json` into it, unless it has checkpoints of another run.

    Returns:
      The fields that changed since the run was last started, see `check_same`.

    Raises:
      UserError: the directory cannot be written, has imported weights, or has a run with another config.
    """
    path = workdir / "config.json"
    if (workdir / IMPORTED).exists():
        raise UserError(
            f"--workdir={workdir}: has imported weights without an optimizer state, so training cannot "
            f"resume here; use another --workdir, and --config.train.init_from={workdir} to start from them"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        changes = check_workdir(workdir, config)
        write_atomically(path, (json.dumps(seal(to_dict(config)), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({reason(error)})") from None
    return changes


def check_data(workdir: AnyPath, card: dict[str, Any], rows: bool = False) -> str | None:
    """Checks that the checkpoints in `workdir` were trained on the data of a card.

    Args:
      workdir: directory of the run.
      card: data card of the run that is to resume.
      rows: compare the hashes of the rows as well.

    Returns:
      A warning if there is no data card in `workdir`, as earlier versions wrote none; else None.

    Raises:
      UserError: the data differ, or the data card in `workdir` is corrupt.
    """
    path, names = workdir / DATA, [step.name for step in workdir.glob("checkpoints/*")]
    step = max((int(name) for name in names if name.isdecimal()), default=None)
    if step is None:
        return None
    try:
        changes = data_changes(unseal(parse(path.read_text())), card, rows)
    except FileNotFoundError:
        return (
            f"warning: no {DATA} in {workdir}: cannot check that the data are unchanged since step {step:,}"
        )
    except ValueError as error:
        raise UserError(f"{path}: not a data card ({error}); restore or delete the file") from None
    if changes:
        raise UserError(
            f"{workdir}: the data changed since step {step:,}: {changes}; "
            "restore the files or use a new --workdir"
        )
    return None


def claim_data(workdir: AnyPath, card: dict[str, Any]) -> str | None:
    """Writes the data card of a run into `workdir` after `check_data`, with its result and errors."""
    warning = check_data(workdir, card, rows=True)
    write_atomically(workdir / DATA, (json.dumps(seal(card), indent=1) + "\n").encode())
    return warning


def open_tokenizer(workdir: AnyPath) -> data.Tokenizer | None:
    """Loads the tokenizer from the run's `tokenizer/`; None if there is none.

    Raises:
      UserError: the tokenizer is corrupt, or is not the one that the data card of the run names.
    """
    directory = workdir / TOKENIZER
    if not directory.exists():
        return None
    tokenizer, card = data.load_tokenizer(directory), workdir / DATA
    try:
        trained_with = unseal(parse(card.read_text())).get("tokenizer_sha256", tokenizer.sha256)
    except FileNotFoundError:  # imported, or of an earlier version
        return tokenizer
    except ValueError as error:
        raise UserError(f"{card}: not a data card ({error}); restore or delete the file") from None
    if trained_with != tokenizer.sha256:
        raise UserError(
            f"{directory}: sha256 {tokenizer.sha256[:12]}, but the run was trained with the tokenizer of "
            f"sha256 {trained_with[:12]}; restore the folder"
        )
    return tokenizer


def begins_with_bos(workdir: AnyPath, tokenizer: data.Tokenizer) -> bool:
    """True if a prompt starts with BOS: as in training; for an imported model, as in transformers."""
    if tokenizer.bos_id is None:
        return False
    return not (workdir / IMPORTED).exists() or adds_bos(tokenizer, workdir / TOKENIZER)


def read_config(path: AnyPath) -> dict[str, Any]:
    """Reads and validates the config of a run, in the form of `to_dict`; it may be older than some fields.

    Raises:
      UserError: the file is missing, corrupt or not a config.
    """
    try:
        values = unseal_if_sealed(parse(path.read_text()))
        for name, before in BEFORE.items():
            group, _, field = name.partition(".")
            if isinstance(values, dict) and isinstance(values.get(group), dict):
                values[group].setdefault(field, before)
        from_config_dict(values)
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing, although there are checkpoints; restore it or use another --workdir"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path}: not the config of a run ({error}); restore it or use another --workdir"
        ) from None
    return values


def check_same(path: AnyPath, there: dict[str, Any], config: Config) -> list[str]:
    """Checks that the config read from `path` differs from `config` in resumable fields only.

    Returns:
      The fields that differ, such as "train.eval_every 100 -> 50".

    Raises:
      UserError: other fields differ; the message names them.
    """
    old, new = BEFORE | flatten(there), flatten(to_dict(config))
    changed = [name for name in new if old.get(name) != new[name]]
    differences = [
        f"{name} is {old.get(name)!r} there and {new[name]!r} here"
        for name in changed
        if name not in RESUMABLE
    ]
    if differences:
        raise UserError(
            f"{path}: belongs to a run with a different config: {'; '.join(differences)}. "
            "Use another --workdir, or delete that run"
        )
    return [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in changed]


def data_notes(card: dict[str, Any]) -> list[str]:
    """Lines about the held-out text: leakage from the training text, and a split within one document."""
    notes = [f"warning: {sentence}" for sentence in [leakage(card)] if sentence]
    if card.get("split") == BY_PLACE:
        train, *parts = (card["splits"][split]["text_bytes"] for split in ("train", *HELD_OUT))
        held_out = sum(parts)
        notes.append(
            f"{card['source']} is one document: its last {held_out / (train + held_out):.1%} ({held_out:,} "
            "bytes) are held out"
        )
    return notes + list(_turn_notes(card))


def _turn_notes(card: dict[str, Any]) -> Iterator[str]:
    """Lines about conversations that are longer than a row."""
    if not card.get("template"):
        return
    cut, left_out, total = (
        sum(entry[name] for entry in card["splits"].values()) for name in ("cut", "left_out", "documents")
    )
    if cut or left_out:
        yield (
            f"{cut + left_out:,} of {total:,} conversations are longer than a row of "
            f"{card['sequence_length'] + 1:,} tokens: of {cut:,} the first turns are used, {left_out:,} are "
            "left out, as their first reply ends beyond it"
        )


def repeats_note(config: Config, card: dict[str, Any]) -> str | None:
    """Says how often a run sees its training text; None where it sees no token twice."""
    if config.data.is_task:
        return None
    rows = card["splits"]["train"]["rows"]
    times = config.train.steps * config.train.batch_size / rows
    return f"the text is seen {times:.1f} times ({rows:,} rows)" if times > 1 else None
