"""Training: start, loop, checkpoints and best step."""

import nemo_steerlm.models  # noqa: F401  (before Lightning: the CPU backend, quiet loggers)
