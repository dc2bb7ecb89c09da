"""README.md of a model on the hub, which calls it model card: plain data here, prose in `templates/hub_card.md.j2`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.report.origin import Origin

_TASKS = {"policy": "text-generation", "regressor": "text-classification", "language_model": "text-generation"}
_NAMED = re.compile(r'^(name = |NAME=)".*?"(  # this folder)?$', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What README.md says of a model besides its origin.

    Attributes:
        kind: "policy", "regressor" or "language_model".
        schema: its attributes.
        prompt: text that it reads: a request with the attributes' defaults, or an answer to rate.
        pieces: the prompt cut around the question and the attribute string, for a policy.
        stops: strings at which an answer ends.
        hugging_face: whether it is a Hugging Face folder, else one of ours.
        transformers: whether transformers' tokenizer reads the prompt as ours, so that its code can be shown.
        longest: of a prompt with its answer, tokens.
        remarks: sentences about this very folder.
    """

    kind: str
    schema: AttributeSchema | None
    prompt: str
    pieces: tuple[str, str, str] | None
    stops: Sequence[str]
    hugging_face: bool
    transformers: bool
    longest: int
    remarks: Sequence[str] = ()


def hub_card(name: str, described: Description, known: Origin) -> str:
    """The text of README.md: front matter in YAML, then Markdown.

    Args:
        name: what the code on the page loads: "." for the folder of the page, or `OWNER/NAME` on the hub.
        described: the model.
        known: its origin.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"cell": _cell, "python": repr, "thousands": "{:,}".format}
    page = environment.get_template("hub_card.md.j2")
    return page.render(
        name=name, of=described, known=known, front=_front(described, known), data=_data(known),
        attributes=[
            (one.name, f"{one.low} to {one.high}", one.default, one.description) for one in described.schema or ()
        ],
    )  # fmt: skip


def with_name(readme: str, name: str) -> str:
    """README.md whose code loads the model by this name; what its reader changed in it stays."""
    return _NAMED.sub(lambda found: f'{found[1]}"{name}"', readme)


def _front(described: Description, known: Origin) -> str:
    """The front matter that the hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    of_hub = known.base is not None and "/" in known.base
    card = ModelCardData(
        **known.license,
        base_model=known.base if of_hub else None,
        library_name="transformers" if described.hugging_face else "nemo",
        pipeline_tag=_TASKS[described.kind],
        tags=["steerlm", "nemo", *(["reward-model"] if described.kind == "regressor" else [])],
    )
    return card.to_yaml()


def _data(known: Origin) -> list[dict[str, Any]]:
    """The trainings: what was counted, the main settings, and the files by their names."""
    found = []
    for run in known.runs:
        if run["verb"] in ("import", "export"):
            continue
        config, counts = run["config"], (run.get("data") or {}).get("train") or {}
        several = counts if "tokens" not in counts else {"": counts}  # by file, where there are several
        trainer, optimizer = config.get("trainer", {}), config.get("optimizer", {})
        lora = config.get("model", {}).get("lora", {}).get("rank")
        length = f"{trainer['max_steps']} steps" if trainer.get("max_steps") else f"{trainer.get('max_epochs')} epochs"
        facts = [f"{length} of {trainer.get('global_batch_size')} samples", f"learning rate {optimizer.get('lr'):g}"]
        facts += [f"LoRA rank {lora}"] if lora else []
        files = [
            ("/".join(Path(one["path"]).parts[-2:]), one["bytes"], one["sha256"]) for one in run.get("inputs", ())
        ]
        found.append(
            {"verb": run["verb"], "facts": ", ".join(facts), "counts": _counts(several.values()), "files": files}
        )
    return found


def _counts(several: Collection[Mapping[str, int]]) -> str:
    words = {"kept": "samples", "tokens": "tokens", "loss_tokens": "of them trained on"}
    sums = {key: sum(counts.get(key, 0) for counts in several) for key in words}
    return ", ".join(f"{sums[key]:,} {text}" for key, text in words.items() if sums[key])


def _cell(text: object) -> str:
    """Text in a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")
