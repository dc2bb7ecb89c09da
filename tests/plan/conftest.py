"""The fake GPU's room, which measures what these tests estimate."""

from tests.fake_gpu.conftest import room  # noqa: F401
