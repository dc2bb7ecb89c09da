"""A training: how it starts, its loop, its checkpoints and its best step."""

import nemo_steerlm.models  # noqa: F401  (before Lightning: the CPU backend, quiet loggers)
