"""The NeMo model classes."""

import logging

from nemo_steerlm.megatron.deferred import deferring  # and with it the CPU backend, before megatron-core

for _chatty in ("lightning.pytorch", "nemo_logger"):  # about their own set-up
    logging.getLogger(_chatty).setLevel(logging.ERROR)
logging.getLogger("nv_one_logger").setLevel(logging.CRITICAL)  # telemetry: its spans end out of order at a stop

with deferring():
    import nemo_steerlm.models.generative  # noqa: F401  (registers the generative head; after the loggers)
