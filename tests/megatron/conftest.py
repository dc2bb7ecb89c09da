"""Fixtures of more than one file."""

from __future__ import annotations

import pytest

from tests.megatron.generation_world import World


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """For files of the xdist_group "generation", which are on one worker: so it is built once."""
    return World(tmp_path_factory.mktemp("generation"))
