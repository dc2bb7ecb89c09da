"""The NeMo model classes."""

import logging

import nemo_steerlm.megatron  # noqa: F401  (before megatron-core: the CPU backend)

for _chatty in ("lightning.pytorch", "nemo_logger"):  # about their own set-up
    logging.getLogger(_chatty).setLevel(logging.ERROR)
logging.getLogger("nv_one_logger").setLevel(logging.CRITICAL)  # telemetry: its spans end out of order at a stop

import nemo_steerlm.models.generative  # noqa: E402, F401  (registers the generative head; after the loggers)
