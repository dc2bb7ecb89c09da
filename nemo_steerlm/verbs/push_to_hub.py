"""`steerlm push-to-hub`: put a model on the Hugging Face hub, with a README.md that describes it."""

from __future__ import annotations

from pathlib import Path

from nemo_steerlm import hub, integrity
from nemo_steerlm.config import PushToHubConfig
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats import hf_folder, model_folder
from nemo_steerlm.report.hub_card import with_name
from nemo_steerlm.verbs.describe import readme

_PRIVATE = "run.json"  # of an exported folder: it names files of this machine


def main(config: PushToHubConfig) -> str:
    """`steerlm push-to-hub`: upload `config.input`; returns one line with the address and the commit.

    Raises:
        ConfigError: a setting is wrong.
        CheckpointError: the folder is no model, or is damaged, or the hub does not take it.
    """
    config.validate()
    folder = Path(config.input)
    if model_folder.is_model_folder(folder):
        card = model_folder.read(folder)
        integrity.check(folder / "weights")
        text = readme(config.repository, card, model_folder.read_tokenizer(folder), folder)
        hidden: tuple[str, ...] = ()
    elif hf_folder.is_folder(folder):
        page = folder / "README.md"
        if not page.is_file():
            raise CheckpointError(f"{page}: no such file; it is written by `steerlm export`, and describes the model")
        text, hidden = with_name(page.read_text(encoding="utf-8"), config.repository), (_PRIVATE,)
    else:
        raise CheckpointError(
            f"{folder}: expected a folder that `steerlm export` wrote, or a model folder: the model/ of a run"
        )
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    content: dict[str, Path | bytes] = {name: path for name, path in files.items() if name not in hidden}
    content["README.md"] = text.encode()
    return f"{hub.upload(config.repository, content, config.private)}: {len(content)} files"
