"""SteerLM on NeMo and Megatron: train attribute regressors, label data with them, train and steer policies."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_MODELS = {"AttributeConditionedGPT": "policy", "AttributeRegressor": "regressor"}
_STEPS = ("train_regressor", "annotate", "train_sft", "bootstrap")


def __getattr__(name: str) -> Any:
    """Load a step, or a model class and torch with it, when it is first asked for."""
    if name in _MODELS:
        return getattr(importlib.import_module(f"nemo_steerlm.models.{_MODELS[name]}"), name)
    if name in _STEPS:
        return getattr(importlib.import_module("nemo_steerlm.api"), name)
    raise AttributeError(f"module 'nemo_steerlm' has no attribute '{name}'")
