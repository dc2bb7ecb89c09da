"""Everything that touches megatron-core. Importing it makes "cuda" mean the CPU where CUDA is absent."""

import logging
import warnings

from nemo_steerlm import environment, installed

installed.check()  # before torch and megatron-core fail on unsuitable versions
environment.set_defaults()
logging.getLogger("megatron").setLevel(logging.ERROR)
for _message in (
    ".*(Transformer Engine|Apex).* (is|are) not installed.*",
    ".*full scope is deprecated.*",
    ".*use DTensor instead.*",
    ".*`load_state_dict` is deprecated.*",
):  # megatron-core's own warnings; nothing a user could act on
    warnings.filterwarnings("ignore", message=_message)

from nemo_steerlm.megatron.deferred import deferring  # noqa: E402

with deferring():
    from nemo_steerlm.megatron import cpu

    cpu.install()
    import megatron.core  # noqa: F401  (where there is CUDA, nobody has yet)
