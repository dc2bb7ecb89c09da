"""The room, one a pytest process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_steerlm.fake_gpu import guard
from nemo_steerlm.fake_gpu.room import Room


@pytest.fixture(scope="session")
def room() -> Iterator[Room]:
    """Where functions run on a fake GPU."""
    reason = guard.missing()
    if reason is not None:
        pytest.skip(reason)
    with Room() as made:
        yield made
