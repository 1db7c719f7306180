"""The metrics log: nothing lost, nothing twice, whatever happens between checkpoint and kill."""

import json
import os

import pytest
from tensorboardX.proto.event_pb2 import Event

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.metrics import MetricsLog
from mobilellm_jax.storage.writers import TensorBoard


def write_steps(log: MetricsLog, steps: range) -> None:
    for step in steps:
        log.train(step, 5.0 - step, 1.0, 1e-3, 0.5 * step)
        if step % 2 == 0:
            log.evaluation(step, 6.0 - step, 2.0, 0.25)
    log.close()


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write_steps(MetricsLog(tmp_path, 0), range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # killed while writing
    log = MetricsLog(tmp_path, 3)
    assert log.train_s == 1.5
    assert [step for step, _ in log.train_curve] == [1, 2, 3]
    write_steps(log, range(4, 7))
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "eval"] == [2, 4, 6]
    last = {"step": 6, "loss": 0.0, "bits_per_byte": 2.0, "error": 0.25}
    assert [e["step"] for e in log.evaluations] == [2, 4, 6]
    assert log.evaluations[-1] == last


def test_starting_over_starts_an_empty_log(tmp_path):
    write_steps(MetricsLog(tmp_path, 0), range(1, 4))
    write_steps(MetricsLog(tmp_path, 0), range(1, 2))
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.train(1, float("nan"), float("inf"), 1e-3, 0.1)
    log.close()
    assert lines(tmp_path)[0]["loss"] is None
    assert lines(tmp_path)[0]["grad_norm"] is None


def test_a_damaged_line_is_named(tmp_path):
    write_steps(MetricsLog(tmp_path, 0), range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"kind"', "{kind", 1))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is corrupt"):
        MetricsLog(tmp_path, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"4.0", b"5.0"),
        (b'"sha256"', b'"sha257"'),
        (b'"step": 3', b'"step": 2'),
        (b"}\n", b"|\n"),
        (b"}\n", b"}*"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_damage_that_may_be_json_is_named(tmp_path, old, new, last):
    write_steps(MetricsLog(tmp_path, 0), range(1, 4))
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    changed = new.join(content.rsplit(old, 1)) if last else content.replace(old, new, 1)
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line \d is corrupt"):
        MetricsLog(tmp_path, 3)


def test_a_log_without_seals_is_read_and_gets_them(tmp_path):
    write_steps(MetricsLog(tmp_path, 0), range(1, 4))
    path = tmp_path / "metrics.jsonl"
    sealed = path.read_bytes()
    bare = [{name: value for name, value in line.items() if name != "sha256"} for line in lines(tmp_path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert path.read_bytes() != sealed
    MetricsLog(tmp_path, 3).close()
    assert path.read_bytes() == sealed


def with_events(workdir):
    return MetricsLog(workdir, 0, open_writers=lambda: [TensorBoard(workdir / "tensorboard", 0)])


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    write_steps(with_events(tmp_path), range(1, 3))
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, values = path.read_bytes(), {}
    while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            values[value.tag, event.step] = value.simple_value
        data = data[16 + length :]
    assert values["train/loss", 2] == 3.0
    assert values["eval/loss", 2] == 4.0
    assert values["eval/bits_per_byte", 2] == 2.0
    assert values["eval/error", 2] == 0.25


def test_a_log_that_is_gone_is_not_begun_anew(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot read the log .*: No such file"):
        MetricsLog(tmp_path, 3)


def test_a_full_disk_is_told_and_nothing_waits_for_it(tmp_path):
    log = with_events(tmp_path)
    with open("/dev/full", "w") as full:
        os.dup2(full.fileno(), log._file.file.fileno())
    for step in range(1, 15):  # more events than the queue of a SummaryWriter holds
        log.train(step, 1.0, 1.0, 1e-3, 0.1)
    with pytest.raises(UserError, match=f"{tmp_path}: the log cannot be written: No space left on device"):
        log.flush()
    with pytest.raises(UserError, match="No space left"):
        log.close()
    log.close()
