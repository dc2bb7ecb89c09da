"""A made-up run with every part a report can show, its figures computed the way a real run computes them."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np

from nemo_steerlm.agreement import attribute_metrics
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.evaluate.metrics import paired_difference
from nemo_steerlm.evaluate.reports import ArmChange, Change
from nemo_steerlm.evaluate.steerability import label_information, plan_requests, setting_costs, steerability

SCHEMA = AttributeSchema.load("synthetic")
NAMES = SCHEMA.names
DEFAULTS = {"quality": 4, "helpfulness": 3, "verbosity": 2, "humor": 0, "toxicity": 0}


def sweep(noise: float, obedience: float, seed: int) -> dict[str, Any]:
    """Figures of a policy that follows a share of what it is asked."""
    random = np.random.default_rng(seed)
    plan = plan_requests(SCHEMA, 24, defaults=DEFAULTS)
    asked = np.array([list(request.values.values()) for request in plan])
    measured = obedience * asked + (1 - obedience) * 2 + random.normal(0, noise, asked.shape)
    measured[:, 0] -= 0.11 * asked[:, 4]
    columns = dict(zip(NAMES, np.clip(measured, 0, 4).T))
    texts = [f"{request.prompt} {request.level or 2}" for request in plan]  # level 0 and level 2 say the same
    found = steerability(plan, columns, SCHEMA, seed=0, resamples=60, answers=texts)
    return {**found, "costs": setting_costs(plan, columns["quality"], SCHEMA, seed=0)}


def heard(worth: float, seed: int) -> dict[str, Any]:
    """What labels are worth to a policy."""
    random = np.random.default_rng(seed)
    true = random.gamma(20, 3, 200)

    def lost(share: float) -> Change:
        return label_information(true, true + random.normal(share * worth, 2, 200), np.ones(200), seed=0)

    each = {name: lost((k + 1) / 8) for k, name in enumerate(NAMES)}
    return {"rows": 200, "loss": float(true.mean()), "permuted": lost(1), "none": lost(0.7), "attributes": each}


def step_four(shift: float, seed: int) -> ArmChange:
    random = np.random.default_rng(seed)
    before = random.normal(3.0, 0.6, (120, 2))
    after = before + random.normal(shift, 0.5, before.shape)
    each = {
        name: paired_difference(before[:, k], after[:, k], seed=0, resamples=60)
        for k, name in enumerate(("quality", "helpfulness"))
    }
    return {**paired_difference(before.mean(1), after.mean(1), seed=0, resamples=60), "attributes": each}


@functools.cache
def _report_data() -> dict[str, Any]:
    random = np.random.default_rng(5)
    target = random.integers(0, 17, (500, 5)) / 4
    predicted = 0.9 * target + 0.2 + random.normal(0, [0.5, 0.35, 0.3, 0.4, 0.35], target.shape)
    human = np.clip(target + random.normal(0, 0.8, target.shape), 0, 4).round()
    human[random.random(human.shape) < 0.2] = math.nan
    regressor: dict[str, dict[str, Any]] = attribute_metrics(predicted, target, SCHEMA)
    for name, figures in attribute_metrics(human, target, SCHEMA).items():
        regressor[name]["human"] = figures
    policy = sweep(0.62, 0.95, 0)
    sources = {"none": (1.2, 0.0), "permuted": (1.2, 0.02), "human": (0.95, 0.8), "predicted": (0.62, 0.95)}
    prompt = "User: How long should I bake the bread?\nContext: the oven is an old one."
    samples: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "requested": {**DEFAULTS, "humor": level},
            "response": text,
            "measured": {**DEFAULTS, "humor": level + 0.2, "quality": 3.6},
        }
        for level, text in (
            (0, "Bake the bread for 40 minutes at 220 degrees. Use a thermometer to check the middle."),
            (
                4,
                "Bake the giggling bread for 40 minutes, crumb wizard!\nThen tickle it with a thermometer.",
            ),
        )
    ]
    hostile = "<script>alert(1)</script> & \"quotes\" <img src=x onerror='alert(2)'>"
    samples.append({"prompt": hostile, "requested": {"quality": 0.0}, "response": hostile, "measured": None})
    return {
        "title": "SteerLM quickstart",
        "summary": "Four steps of SteerLM on a small synthetic dialogue world, from random weights.",
        "attributes": SCHEMA.to_dict(),
        "regressor": regressor,
        **policy,
        "listening": heard(6.0, 4),
        "ways": {way: sweep(noise, 0.95, 0)["steerability"] for way, noise in (("default", 0.62), ("alone", 0.9))},
        "requests": [
            {"asked": "one attribute", "spearman": 0.93, "n": 600, "empty": 0, "distinct_2": 0.97},
            {"asked": "nothing", "n": 60, "empty": 3, "distinct_2": 0.96},
        ],
        "label_source": {name: sweep(*how, seed=1)["steerability"] for name, how in sources.items()},
        "bootstrap": {
            **step_four(0.12, 2),
            "control": step_four(0.02, 3),
            "rounds": 1,
            "sampled": 2400,
            "kept": 480,
            "filter": "best fifth by predicted quality + helpfulness",
        },
        "seconds": {
            "world": 2.8,
            "train_regressor": 61.3,
            "annotate": 5.1,
            "train_policy": 88.0,
            "sweep": 14.2,
            "bootstrap": 47.9,
            "total": 225.4,
        },
        "settings": {
            "model": {"num_layers": 2, "hidden_size": 128, "rope_scaling": None},
            "sampling": {"temperature": 1.0, "top_k": 50},
            "parallel": {"tensor": 1},
            "deterministic": True,
        },
        "seed": 1234,
        "versions": {"nemo_steerlm": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1"},
        "samples": samples,
        "arrays": {"regressor": {"predicted": predicted, "target": target, "human": human}},
    }


def report_data() -> Any:
    """The `Results` that `write_report` takes, with more keys than its type has; a copy of your own."""
    return copy.deepcopy(_report_data())
