"""Progress in a log and on a terminal, with a clock of the test's own."""

from __future__ import annotations

import io
import sys

import pytest

from nemo_steerlm.progress import INTERVAL, Progress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_half_a_minute_and_one_at_the_end(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    with Progress("out.jsonl", 400, "responses", clock=clock) as progress:
        for _ in range(40):
            clock.now += INTERVAL / 8
            progress.update(10, "12 tokens/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "out.jsonl: responses 80 of 400, 12 tokens/s, 02:00 left"
    assert lines[-1] == "out.jsonl: responses 400 of 400, 12 tokens/s, took 02:30"
    assert len(lines) == 5 and not any("\r" in line for line in lines)


def test_a_log_tells_news_at_once_and_nothing_twice(capsys: pytest.CaptureFixture) -> None:
    progress = Progress("policy", 3, "steps", start=1, clock=Clock())
    progress.update(1, "loss 2", now=True)
    progress.update(0, "loss 2", now=True)
    progress.update(1, "loss 1")
    progress.close()
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "policy: steps 2 of 3, loss 2, 00:00 left",
        "policy: steps 3 of 3, loss 1, took 00:00",
    ]


def test_an_error_is_no_end_and_the_other_ranks_are_silent(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(KeyError), Progress("policy", 9, "steps", clock=Clock()) as progress:
        progress.update(1)
        raise KeyError
    with Progress("policy", 9, "steps", shown=False, clock=Clock()) as progress:
        progress.update(1, now=True)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_draws_a_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("policy", 500, "steps") as progress:
        for step in range(500):
            progress.update(1, f"loss {step}")
    drawn = [line for line in terminal.getvalue().split("\r") if "loss" in line]
    assert "500/500" in drawn[-1] and "loss 499" in drawn[-1]
    assert len(drawn) == len({line.split("[")[0] for line in drawn}), "a step was drawn twice"
    assert "\n" not in terminal.getvalue()[:-1]


def test_a_terminal_gets_lines_where_no_bar_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("policy", 2, "steps", bar=False, clock=Clock()) as progress:
        progress.update(2)
    assert terminal.getvalue() == "policy: steps 2 of 2, took 00:00\n"
