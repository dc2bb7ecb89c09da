"""Fixtures of more than one file."""

from __future__ import annotations

import pytest

from tests.data.trees import trees, write_trees


@pytest.fixture
def fixture_trees(tmp_path):
    return write_trees(tmp_path / "some.trees.jsonl", trees())
