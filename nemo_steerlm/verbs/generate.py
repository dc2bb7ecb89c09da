"""Answer one prompt with the attributes the user asks for."""

from __future__ import annotations

import logging
import sys

from nemo_steerlm.config import GenerateConfig
from nemo_steerlm.conversation import DEFAULT_SYSTEM
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.terminal import readable

logger = logging.getLogger(__name__)


def main(config: GenerateConfig) -> None:
    """`steerlm generate`: write the answer to standard output, its control characters as escapes.

    While it is drawn, its tokens are counted on standard error.
    """
    parallel.start(config)
    model = AttributeConditionedGPT.from_pretrained(
        config.checkpoint, parallel=config.parallel, precision=config.trainer.precision
    )
    asked = model.request(config.attributes)
    logger.info("asked for: %s", ", ".join(f"{name} {value:g}" for name, value in asked.items()) or "nothing")
    answer = model.generate(
        config.prompt, config.attributes, system=config.system or DEFAULT_SYSTEM,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        seed=config.seed, progress=True,
    )  # fmt: skip
    if parallel.is_rank_zero():
        sys.stdout.write(readable(answer) + "\n")
