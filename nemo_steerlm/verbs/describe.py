"""README.md of an exported folder and of a model folder, for the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_steerlm.conversation import VALUE_TO_TEXT, Conversation, Turn
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.report.hub_card import Description, hub_card
from nemo_steerlm.report.origin import origin
from nemo_steerlm.speakers import ASSISTANT, USER
from nemo_steerlm.tokenizer import Tokenizer

_QUESTION = "How do I grow tomatoes?"
_ANSWER = "Plant them in the sun and water them every day."


def readme(
    name: str, card: ModelCard, tokenizer: Tokenizer, checkpoint: Path, exported: Path | None = None,
    remarks: Sequence[str] = (),
) -> str:  # fmt: skip
    """The text of README.md.

    Args:
        name: what the code on the page loads: "." for the folder of the page, or `OWNER/NAME` on the hub.
        card: of the model.
        tokenizer: of the model.
        checkpoint: the model folder, with the files of its training around it.
        exported: the Hugging Face folder, with its tokenizer; None: the page is about the model folder.
        remarks: sentences about this very folder.
    """
    prompt, pieces = _prompt(card)
    ids = (
        None if card.schema is None else card.template.encode_prompt(_asked(), card.schema, _defaults(card), tokenizer)
    )
    described = Description(
        kind=card.kind, schema=card.schema, prompt=prompt, pieces=pieces, stops=card.template.stops,
        hugging_face=exported is not None, transformers=exported is not None and _read_alike(exported, prompt, ids),
        longest=card.architecture.max_position_embeddings, remarks=remarks,
    )  # fmt: skip
    return hub_card(name, described, origin(checkpoint))


def _asked() -> Conversation:
    return Conversation([Turn(USER, _QUESTION)])


def _defaults(card: ModelCard) -> dict[str, float]:
    return {} if card.schema is None else card.schema.complete({})


def _prompt(card: ModelCard) -> tuple[str, tuple[str, str, str] | None]:
    """A prompt as the model reads it; that of a policy also cut around the question and the attribute string."""
    if card.schema is None:
        return "", None
    if card.kind == "regressor":
        return card.template.render_regression(
            Conversation([Turn(USER, _QUESTION), Turn(ASSISTANT, _ANSWER)]), 1
        ), None
    turns = [Turn(USER, _QUESTION), Turn(ASSISTANT, "", label=_defaults(card))]
    [opening, *_] = card.template.spans(Conversation(turns, type=VALUE_TO_TEXT), card.schema)
    before, _, rest = opening.text.partition(_QUESTION)
    between, _, after = rest.partition(card.schema.format(_defaults(card)))
    return opening.text, (before, between, after)


def _read_alike(folder: Path, prompt: str, ids: list[int] | None) -> bool:
    """Whether the folder's tokenizer gives stock transformers the ids that the policy was trained on."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return False
    return theirs(prompt, add_special_tokens=False)["input_ids"] == ids
