"""What a sweep shows of itself: counts, time left, lines in a log, a block on a terminal."""

import os
import pty
import re
import signal

import pytest
from commands import ROOT, start

from experiments.runner import view
from experiments.runner.view import Event, Tally, View


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def tally(clock):
    """Two points; a run of "b" costs three times one of "a"."""
    left, compared = {"a": 4, "b": 4}, {"a": 2, "b": 2}
    return Tally(done=1, left=left, compared=compared, costs={"a": 1.0, "b": 3.0}, expected_s=60)


def test_time_left_is_what_is_expected_until_a_run_is_over(clock, tally):
    assert str(tally) == "1 of about 9 runs, 1:00 left"
    clock[0] += 20
    tally.at_work("a", 0.5)
    assert tally.seconds_left() == 40
    clock[0] += 1000
    assert tally.seconds_left() == 0


def test_time_left_is_in_proportion_to_cost(clock, tally):
    """After 30 s a run of a is over (cost 1) and two thirds of one of b (2): 13 of 16 are left, 10 s each."""
    clock[0] += 30
    tally.at_work("b", 2 / 3)
    tally.run_over("a")
    assert tally.seconds_left() == pytest.approx(130)
    assert str(tally) == "2 of about 9 runs, 2:10 left"


def test_a_search_has_as_many_runs_as_it_took(clock, tally):
    for _ in range(6):  # two more than expected
        tally.run_over("a")
    tally.settle("a", searched=True)
    tally.settle("b", searched=True)  # shorter
    assert (tally.done, tally.total) == (7, 11)
    tally.settle("b", searched=False)  # another sweep did them
    assert tally.total == 9


def test_workers_may_tell_of_steps_while_the_time_is_drawn(clock):
    class Costs(dict):
        def __getitem__(self, point):
            tally.at_work(f"{point} again", 0.1)
            return 1.0

    tally = Tally(done=0, left={"a": 4}, compared={"a": 2}, costs=Costs(), expected_s=None)
    clock[0] += 10
    tally.run_over("a")
    tally.at_work("a", 0.5)
    assert tally.seconds_left() == pytest.approx((3 - 0.6) * 10 / 1.6)  # "a again" was at work before


def test_time_that_is_unknown_is_not_shown():
    assert str(Tally(0, {"a": 3}, {"a": 3}, {"a": 1.0}, None)) == "0 of about 3 runs"


def test_a_log_has_a_line_for_each_run_and_one_a_minute_for_a_long_one(clock, tally, capsys):
    shown = View(tally, lines_every=60)
    shown.begun("a")
    for step in range(1, 7):
        clock[0] += 25
        shown.hear("a", Event("a-s0", f"step {step}/6", step / 6))
        shown.hear("a", Event("a-s0", "the text is seen twice"))
    shown.hear("a", Event("a-s0", "finished: loss 1", over=True))
    shown.hear("a", Event("a-s1", "the text is seen twice"))
    shown.hear("a", Event("a-s1", "diverged: at step 3", over=True))
    shown.hear("a", Event("a", "error: the disk is full", error=True))
    shown.ended("a", "1 of 2 points done")
    output = capsys.readouterr()
    assert output.err == "a  error: the disk is full\n"
    assert [re.sub(r"(, \S+ left)", "", line) for line in output.out.splitlines()] == [
        "a-s0  the text is seen twice",
        "a-s0  step 3/6",
        "a-s0  step 6/6",
        "a-s0  finished: loss 1  (2 of about 9 runs)",
        "a-s1  diverged: at step 3  (3 of about 9 runs)",
        "a  1 of 2 points done",
    ]


def test_lines_every_0_are_all_lines(clock, tally, capsys):
    shown = View(tally, lines_every=0)
    shown.begun("a")
    for step in range(3):
        shown.hear("a", Event("a-s0", f"step {step}/9", step / 9))
    assert len(capsys.readouterr().out.splitlines()) == 3


LIVE = """
import sys, time
from experiments import cli
from experiments.runner.view import Event, Tally, view_of

def main():
    names = ("a", "b")
    tally = Tally(0, dict.fromkeys(names, 2), dict.fromkeys(names, 2), dict.fromkeys(names, 1.0), 60)
    with view_of(tally, 60) as view:
        for name in names:
            view.begun(name)
        view.hear("a", Event("a-s0", "finished: loss 1.5", over=True))
        view.hear("b", Event("b-s0", "step 3/9  loss 2.5", 1 / 3))
        view.hear("b", Event("b", "mean loss 3.5"))
        time.sleep(WAIT)
    print("the report", flush=True)
    return 0

if __name__ == "__main__":
    cli.run(main)
"""


def screen(text):
    """Lines of a terminal after it has printed `text`; knows what rich uses to redraw."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            if part.endswith("A"):
                row -= int(part[2:-1] or 1)
            elif part.endswith("K"):
                lines[row] = ""
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


STOPPED = "stopped by SIGTERM with nothing to save. Run the same command again; what was saved is kept"


@pytest.mark.parametrize(
    ("wait", "number", "status", "last"),
    [(0.7, None, 0, "the report"), (60, signal.SIGTERM, 75, STOPPED)],
    ids=["end", "signal"],
)
def test_a_terminal_has_a_live_block_and_is_left_clean(tmp_path, wait, number, status, last):
    (tmp_path / "probe.py").write_text(LIVE.replace("WAIT", str(wait)))
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "90", "LINES": "30", "PYTHONPATH": str(ROOT)}
    process = start("probe", env=environment, cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
            if number and b"step 3/9" in seen:
                process.send_signal(number)
                number = None
    except OSError:  # the end of a terminal
        pass
    finally:
        assert process.wait(timeout=20) == status, seen
        os.close(ours)
    text = seen.decode()
    block = text.partition("b-s0  step 3/9  loss 2.5")[0]
    assert "1 of about 4 runs, " in block
    assert "a-s0  finished: loss 1.5" in block
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is shown
    assert [line for line in screen(text) if line] == ["b  mean loss 3.5", last]
