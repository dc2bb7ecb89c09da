"""The limit of time leaves room for one more step and its save."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_steerlm.config import TrainerConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.train import saving


class _Clock:
    """A clock that goes on when told; the process began at its zero."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: 500.0 + self.now))
        process = SimpleNamespace(create_time=lambda: 500.0)
        monkeypatch.setattr(saving, "psutil", SimpleNamespace(Process=lambda: process))

    def step(self, limit: saving.TimeLimit, seconds: float, save: float = 0.0) -> bool:
        self.now += seconds
        up = limit.step_ends()
        if save:
            limit.save_begins()
            self.now += save
            limit.save_ends()
        limit.step_begins()
        return up


def test_time_is_up_while_the_longest_step_and_the_longest_save_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    clock.now = 40.0  # loading took so long
    limit = saving.TimeLimit(100.0)
    limit.step_begins()
    assert not clock.step(limit, 5.0)
    assert not clock.step(limit, 9.0, save=11.0)
    assert not clock.step(limit, 5.0, save=8.0)  # 78 s by now; 9 s of a step and 11 s of a save remain
    assert not clock.step(limit, 1.0)
    assert clock.step(limit, 1.0)


def test_without_a_limit_time_is_never_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    assert not clock.step(saving.TimeLimit(None), 1e9, save=1e9)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:10:00", 600.0), ("4:30:05", 16205.0), ("02:00:00:01", 172801.0), ("1-12:00:00", 129600.0), (None, None)],
)
def test_a_time_is_written_as_lightning_and_slurm_users_write_it(text: str | None, seconds: float | None) -> None:
    assert TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1, max_time=text).max_seconds() == seconds


@pytest.mark.parametrize("text", ["10:00", "43200", "1:2:3:4:5", "00:99:00", "soon"])
def test_another_way_to_write_it_is_refused(text: str) -> None:
    config = TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1, max_time=text)
    with pytest.raises(ConfigError, match=f"trainer.max_time={text}: expected HH:MM:SS .* in quotes"):
        config.validate("trainer.")
