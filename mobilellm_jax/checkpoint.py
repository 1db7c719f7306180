"""Checkpoints: orbax writes them, a sha256 manifest says whether they are still what was written.

Orbax restores damaged data without an error (measured: 36 of 36 single-bit flips), so every step gets a
manifest once it is complete, and only a step that agrees with its manifest is restored.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from mobilellm_jax.errors import UserError
from mobilellm_jax.results import write_atomically

MANIFEST = "manifest.sha256.json"
PARAMS = "params.safetensors"  # in the checkpoint of an imported model


class Checkpoints:
    """The checkpoints of one run: the two latest, and the one with the lowest held-out loss."""

    def __init__(self, directory: Path):
        """Opens `directory`, making it if it is not there."""
        self._directory = Path(directory).absolute()
        best = policy.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"], n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(2), best]),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._without_manifest: int | None = None  # step of the save in progress

    def save(self, step: int, state: Any, loss: float | None) -> None:
        """Saves `state` in the background; `loss` is its held-out loss in nats per token, where known."""
        self.finish()
        metrics = None if loss is None else {"loss": loss}
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)
        self._without_manifest = step

    def poll(self) -> None:
        """Writes the manifest of a save that has completed; returns at once if none has."""
        if self._without_manifest is not None and not self._manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> None:
        """Waits for the save in progress and writes its manifest."""
        self._manager.wait_until_finished()
        if self._without_manifest is not None and jax.process_index() == 0:
            _write_manifest(self._path(self._without_manifest) / MANIFEST)
        self._without_manifest = None

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """Returns the newest intact step and its state, or None where nothing was saved.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: shapes and placement of the state.

        Raises:
          UserError: there are checkpoints, but all of them are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damage = []
        for step in steps:
            problem = find_damage(self._path(step))
            if problem is None:
                return step, self._manager.restore(step, args=ocp.args.StandardRestore(like))
            damage.append(problem)
            logging.warning("checkpoint of step %d is damaged and will not be used: %s", step, problem)
        if damage:
            raise UserError(
                f"{self._directory}: no checkpoint is intact ({'; '.join(damage)}); "
                "delete the directory to train from the start"
            )
        return None

    def delete_from(self, step: int) -> None:
        """Deletes checkpoints later than `step`, after a fall-back to an earlier one."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        """Waits for the save in progress and releases the threads."""
        self.finish()
        self._manager.close()

    def _path(self, step: int) -> Path:
        return self._directory / str(step)


def load_params(directory: Path, like: Any) -> Any:
    """Returns the parameters of the newest intact checkpoint, in NumPy; nothing in `directory` is changed.

    Args:
      directory: the checkpoints of a run, which may be in progress.
      like: a tree of `jax.ShapeDtypeStruct`, the parameters that the run's config asks for.

    Raises:
      UserError: there is no checkpoint, all of them are damaged, or they are of another shape.
    """
    steps = sorted((int(p.name) for p in directory.glob("*") if p.name.isdecimal()), reverse=True)
    damage = []
    for step in steps:
        path = directory.absolute() / str(step)
        problem = find_damage(path)
        if problem is not None:
            damage.append(problem)
            logging.warning("checkpoint of step %d is damaged and will not be used: %s", step, problem)
            continue
        if (path / PARAMS).exists():
            return _read_params(path, like)
        handler = ocp.PyTreeCheckpointHandler()
        there = handler.metadata(epath.Path(path / "default")).tree["params"]
        _check_same_shapes(path, _shapes(there), _shapes(like))
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        args = ocp.args.PyTreeRestore({"params": like}, {"params": numpy}, partial_restore=True)
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path / "default", args=args)["params"]
    why = f"no checkpoint is intact ({'; '.join(damage)})" if damage else "there is no checkpoint"
    raise UserError(f"{directory}: {why}")


def save_params(path: Path, params: Any) -> None:
    """Writes a checkpoint of parameters alone, for `load_params`.

    Orbax needs three times the memory of the parameters to write them (measured), safetensors none.
    """
    path.mkdir(parents=True)
    named = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(params)}
    safetensors.numpy.save_file(named, path / PARAMS)
    _write_manifest(path / MANIFEST)


def _read_params(path: Path, like: Any) -> Any:
    with safetensors.safe_open(path / PARAMS, framework="np") as file:
        names = file.keys()
        _check_same_shapes(path, {n: tuple(file.get_slice(n).get_shape()) for n in names}, _shapes(like))
        return jax.tree_util.tree_map_with_path(lambda key, _: file.get_tensor(_name(key)), like)


def _name(key: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {_name(key): tuple(leaf.shape) for key, leaf in leaves}


def _check_same_shapes(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: {name} has the shape {there.get(name)} there, and {wanted.get(name)} by config.json"
            )


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with the checkpoint at `path`, or None if every file is as it was written."""
    try:
        expected = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{path.name}/{MANIFEST} is missing or not readable"
    actual = _hash_files(path)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{path.name}/{name} is missing"
        if actual[name] != expected.get(name):
            return f"{path.name}/{name} has changed"
    return None


def _hash_files(path: Path) -> dict[str, str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MANIFEST)
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _write_manifest(path: Path) -> None:
    write_atomically(path, json.dumps(_hash_files(path.parent), indent=1).encode())
