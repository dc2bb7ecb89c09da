"""Print docs/configuration.md: every key of every verb, from the dataclasses of nemo_steerlm/config and from conf/.

`make reference` writes the page.
"""

from __future__ import annotations

import re
import sys

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.config.help import Key, describe_keys

_HEAD = """# Configuration

Every key, with the default that `conf/` and its dataclass give. `make reference` writes this page. On the command line
a key is `optimizer.lr=1e-5`, in a file a section and a name, from Python `optimizer={"lr": 1e-5}`. `steerlm help VERB`
shows the same keys with the values that your groups give. [The command line](command_line.md) tells how files, groups
and sweeps work.

`list[str]` is `[one,two]`; `dict[str, float]` is set by `loss.weights.humor=2`, or as a whole. A required key has no
default.

## Verbs
"""


def _table(keys: list[Key]) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        value = "required" if key.value is None else _code(key.value)
        choices = f": {', '.join(map(_code, key.choices))}" if key.choices else ""
        kind = re.sub(r"\w+Config|Architecture|RopeScaling", "section", key.kind).replace(" | None", " or null")
        rows.append(
            f"| `{key.name}` | {_code(kind.replace(' | ', ' or '))} | {value} | {_plain(key.meaning)}{choices} |"
        )
    return rows


def _code(text: str) -> str:
    assert "|" not in text and "`" not in text, f"{text}: would need an escape in a cell"
    return f"`{text}`"


def _plain(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;").replace("*", "&#42;")


def _anchor(heading: str) -> str:
    """As Python-Markdown makes them."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def page() -> str:
    """The page in Markdown."""
    own: dict[str, list[Key]] = {}
    shared: dict[str, dict[tuple[Key, ...], list[str]]] = {}  # by section: its keys, and the verbs that have them so
    for verb, (_, name, _) in VERBS.items():
        schema = getattr(config, name)
        sections: dict[str, list[Key]] = {}
        own[verb] = []
        for key in describe_keys(schema, compose.draft(verb, schema, ())):
            section, dot, _ = key.name.partition(".")
            (sections.setdefault(section, []) if dot else own[verb]).append(key)
        for section, keys in sections.items():
            shared.setdefault(section, {}).setdefault(tuple(keys), []).append(verb)
    headings = {
        (section, verb): section if len(variants) == 1 else f"{section}: {', '.join(verbs)}"
        for section, variants in shared.items() for verbs in variants.values() for verb in verbs
    }  # fmt: skip
    lines = [_HEAD]
    for verb, (_, _, meaning) in VERBS.items():
        links = [f"[{section}](#{_anchor(heading)})" for (section, of), heading in headings.items() if of == verb]
        lines += [f"### {verb}\n", f"{meaning[0].upper()}{meaning[1:]}.\n", *_table(own[verb])]
        lines += ["", *([f"Sections: {', '.join(links)}.", ""] if links else [])]
    lines.append("## Sections\n")
    for section, variants in shared.items():
        for keys, verbs in variants.items():
            heading = headings[section, verbs[0]]
            of = [] if heading != section else [f"Of {', '.join(verbs)}.\n"]
            lines += [f"### {heading}\n", *of, *_table(list(keys)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
