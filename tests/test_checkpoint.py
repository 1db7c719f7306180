"""Checkpoints: what is restored is what was saved, or nothing is."""

import errno
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import checkpoint, quiet
from mobilellm_jax.storage.checkpoint import MANIFEST, Checkpoints, find_damage

LIKE = {
    "a": jax.ShapeDtypeStruct(
        (300,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "n": {
        "b": jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    },
}


def state(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"a": jnp.asarray(rng.random(300, np.float32)), "n": {"b": jnp.asarray(step, jnp.int32)}}


def save(directory: Path, losses: dict[int, float | None]) -> None:
    checkpoints = Checkpoints(directory)
    for step, loss in losses.items():
        checkpoints.save(step, state(step), loss)
    checkpoints.close()


def restore(directory: Path) -> tuple[int, dict] | None:
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_latest(LIKE)
    finally:
        checkpoints.close()


def files_of(step_directory: Path) -> list[Path]:
    return [path for path in sorted(step_directory.rglob("*")) if path.is_file()]


def test_the_two_latest_and_the_best_are_kept_and_the_latest_is_restored(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    step, restored = restore(tmp_path)
    assert step == 5
    assert_trees_close(restored, state(5), tolerance=0)


def test_nothing_saved_restores_nothing(tmp_path):
    assert restore(tmp_path) is None


def test_a_saved_state_does_not_change_when_its_buffers_are_donated(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    current, expected = state(1), state(1)
    checkpoints.save(1, current, None)
    for _ in range(5):
        current = step(current)
    checkpoints.close()
    assert_trees_close(restore(tmp_path)[1], expected, tolerance=0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])],
    ids=["flip", "delete", "cut"],
)
def test_damage_to_any_file_is_found_and_the_step_before_is_used(tmp_path, damage):
    save(tmp_path, {1: None, 2: None})
    files = [path for path in files_of(tmp_path / "2") if path.stat().st_size]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        damage(path)
        assert find_damage(tmp_path / "2") is not None, path
        path.write_bytes(content)
        assert find_damage(tmp_path / "2") is None
    damage(files[0])
    step, restored = restore(tmp_path)
    assert step == 1
    assert_trees_close(restored, state(1), tolerance=0)


def test_an_empty_step_directory_is_not_a_checkpoint(tmp_path):
    save(tmp_path, {1: None})
    (tmp_path / "2").mkdir()
    assert restore(tmp_path)[0] == 1


def test_a_step_that_was_killed_before_its_manifest_stays_unused(tmp_path):
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "2" / MANIFEST).unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(LIKE)[0] == 1
    checkpoints.delete_after(1)
    checkpoints.save(3, state(3), None)  # must not certify step 2
    checkpoints.close()
    assert not (tmp_path / "2").exists()


def test_a_run_killed_in_its_first_save_starts_anew(tmp_path):
    save(tmp_path, {1: None})
    (tmp_path / "1" / MANIFEST).unlink()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(LIKE) is None
    checkpoints.delete_after(0)
    assert not list(tmp_path.iterdir())
    checkpoints.save(1, state(1), None)
    checkpoints.close()
    assert restore(tmp_path)[0] == 1


def test_when_all_are_damaged_the_directory_and_the_files_are_named(tmp_path):
    save(tmp_path, {1: None})
    flip(tmp_path / "1" / "_METADATA")
    with pytest.raises(UserError, match=f"{tmp_path}.*1/_METADATA has changed"):
        restore(tmp_path)


def test_files_of_others_are_no_damage_and_no_step(tmp_path):
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "2" / ".DS_Store").write_text("x")
    (tmp_path / "2" / "d" / ".nfs0001").write_text("x")
    (tmp_path / "7").write_text("x")  # a plain file
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(LIKE)[0] == 2
    checkpoints.delete_after(2)
    checkpoints.save(3, state(3), None)
    checkpoints.close()
    assert restore(tmp_path)[0] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "7"]


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b"\xff", b'{"files": {}}', b'{"files": {"../../etc/passwd": ""}, "sha256": "0"}'],
    ids=str,
)
def test_a_manifest_that_is_none_is_damage(tmp_path, content):
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "2" / MANIFEST).write_bytes(content)
    assert MANIFEST in find_damage(tmp_path / "2")
    assert restore(tmp_path)[0] == 1


def test_the_best_is_kept_by_losses_that_are_intact(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0})
    manifest = tmp_path / "3" / MANIFEST
    manifest.write_text(manifest.read_text().replace("2.0", "0.0"))
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 5, 6):
        checkpoints.save(step, state(step), 4.0)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_a_failing_write_in_the_background_is_told_and_what_was_saved_stays(tmp_path, monkeypatch, capfd):
    quiet.checkpoints()
    save(tmp_path, {1: None})
    checkpoints = Checkpoints(tmp_path)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_hash_files", fail)
        checkpoints.save(2, state(2), None)
        with pytest.raises(UserError, match=r"step 2 could not be saved: Input/output error; .*kept: 1$"):
            checkpoints.finish()
    checkpoints.close()
    assert restore(tmp_path)[0] == 1


def test_a_disk_that_is_full_or_read_only_is_told_and_what_was_saved_stays(small_disk, capfd):
    quiet.checkpoints()
    directory, like = small_disk / "c", {"a": jax.ShapeDtypeStruct((300_000,), jnp.float32)}
    numbers = np.random.default_rng(0).random(300_000, np.float32)  # random, as orbax compresses
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"a": jnp.asarray(numbers)}, None)
    checkpoints.save(2, {"a": jnp.asarray(numbers + 1)}, None)
    checkpoints.save(3, {"a": jnp.asarray(numbers + 2)}, None)
    with pytest.raises(UserError, match=r"step 3 .*: No space left on device; saved before, and kept: 1, 2$"):
        checkpoints.finish()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"step 4 .*: Read-only file system; saved before, and kept: 1, 2$"):
        checkpoints.save(4, {"a": jnp.asarray(numbers)}, None)
    checkpoints.close()
    checkpoints = Checkpoints(directory)
    step, restored = checkpoints.restore_latest(like)
    checkpoints.close()
    assert step == 2
    np.testing.assert_array_equal(restored["a"], numbers + 1)
    assert "orbax" not in capfd.readouterr().err  # pages of tracebacks
