"""`python -m nemo_steerlm VERB key=value ...`, as torchrun and the local launcher start it."""

from nemo_steerlm.cli import main

if __name__ == "__main__":  # megatron's checkpoint writer imports this module again in its own process
    raise SystemExit(main())
