from __future__ import annotations

from nemo_steerlm.errors import CheckpointError, ConfigError, DataError, SteerLMError, suggest


def test_suggestions():
    assert suggest("humour", ["quality", "humor"]) == "; did you mean 'humor'?"
    assert suggest("QUALITY", ["quality", "humor"]) == "; did you mean 'quality'?"
    assert suggest("xyz", ["quality"]) == suggest("a", []) == ""


def test_all_of_them_are_value_errors():
    for kind in (ConfigError, DataError, CheckpointError):
        assert issubclass(kind, SteerLMError) and issubclass(kind, ValueError)
