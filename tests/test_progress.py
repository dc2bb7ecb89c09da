"""Progress in a log and on a terminal, with a clock of the test's own."""

from __future__ import annotations

import io
import re
import sys
import time

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


def test_without_a_total_a_log_tells_the_speed(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    with Progress("generate", None, "tokens", clock=clock) as progress:
        for _ in range(1500):
            clock.now += 0.03
            progress.update(1)
    assert capsys.readouterr().err.splitlines() == [
        "generate: tokens 1,000, 33.3 tokens/s", "generate: tokens 1,500, 33.3 tokens/s"
    ]  # fmt: skip


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


def test_time_left_counts_only_what_was_done_since_it_began(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    progress = Progress("policy", 100, "steps", start=60, clock=clock)
    clock.now += 50  # a checkpoint is loaded
    progress.begin(60)
    for _ in range(2):
        clock.now += 2
        progress.update(1, now=True)
    progress.begin(80)  # what another run did
    progress.update(0, now=True)
    clock.now += 3
    progress.update(1, now=True)
    assert [line.partition("steps ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "61 of 100, 01:18 left", "62 of 100, 01:16 left", "80 of 100", "81 of 100, 00:57 left"
    ]  # fmt: skip


def test_a_bar_counts_only_what_was_done_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("policy", 10_000, "steps") as progress:
        progress.begin(9_000)
        time.sleep(0.6)
        progress.update(1)
    drawn = terminal.getvalue().split("\r")
    assert " 9000/10000 [" in drawn[3]
    rate = re.search(r" 9001/10000 .*, +([\d.]+) steps/s", drawn[-1])
    assert rate is not None and float(rate[1]) < 2, drawn
