"""Shapes of conf/model for these tests."""

from __future__ import annotations

from omegaconf import OmegaConf

from nemo_steerlm.config import Architecture
from tests.distributed import ROOT


def shape(name: str, layers: int | None = None) -> Architecture:
    """The architecture of conf/model/NAME.yaml, with another number of layers where one is given."""
    values = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").architecture
    architecture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), values))
    assert isinstance(architecture, Architecture)
    if layers is not None:
        architecture.num_layers = layers
    return architecture
