"""Self-contained pages: Python gathers plain data, the templates beside this file render it as HTML."""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nemo_steerlm.files import atomic_writer
from nemo_steerlm.report.canvas import DOTS_PER_INCH
from nemo_steerlm.report.tables import NOTHING, duration, interval, number

Pictures = Mapping[str, tuple[bytes, bytes]]  # PNG bytes for a light and a dark page
_TEMPLATES = Path(__file__).with_name("templates")
_DEEPEST = 45  # per cent of a colour behind a figure: the ink stays readable on it
_LOOKS = {"#": "number", "|": "track"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Commands:
    """Command lines for a page's foot: the one that made it, and the next one."""

    made: str
    next: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A cell of a table with more than a text.

    Attributes:
        text: its text.
        small: a small text below it.
        look: class of the text in report.css.
        share: length of a bar or depth of a colour, per cent.
    """

    text: str = ""
    small: str = ""
    look: str = ""
    share: float | None = None


Row = list[str | Cell]


@dataclass(frozen=True, slots=True)
class Table:
    """Plain texts in rows and columns; # before a heading makes a column of numbers, | one of bars."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Title and class of each column."""
        return [
            (heading[1:], _LOOKS[heading[0]]) if heading[:1] in _LOOKS else (heading, "") for heading in self.headings
        ]


def write_folder(folder: str | Path, html: str, figures: Mapping[str, Any], pictures: Pictures) -> None:
    """Write report.html, report.json (no NaN may be left in it) and the light pictures as NAME.png.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (light, _) in pictures.items():
        (folder / f"{name}.png").write_bytes(light)
    with atomic_writer(folder / "report.html") as file:
        file.write(html)
    with atomic_writer(folder / "report.json") as file:
        file.write(json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def render(
    template: str,
    data: Mapping[str, Any],
    parts: Mapping[str, Any],
    pictures: Pictures | None = None,
    commands: Commands | None = None,
    folder: Path = _TEMPLATES,
) -> str:
    """Render a page.

    Args:
        template: file that sets `title`, `lead` and `sections` (titles by key) and has a macro for each key.
        data: content of report.json.
        parts: the argument of each key's macro; a section without a part is left out.
        pictures: by name, for the macro `picture`.
        commands: for the foot, with the date.
        folder: the template's folder; the package's own templates are found too.
    """
    shown = {name: _picture(*pair) for name, pair in (pictures or {}).items()}
    page = _environment(folder).get_template("page.html.j2")
    made = {"date": date.today().isoformat(), "commands": commands}
    return page.render(template=template, data=data, parts=parts, pictures=shown, **made)


@functools.cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, _TEMPLATES]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "interval": interval, "duration": duration, "words": _words}
    return environment


def _words(html: str) -> set[str]:
    """The words outside of tags, in lower case, those that end in s without it too."""
    found = set(re.findall(r"[a-z][a-z-]*", re.sub(r"<[^>]*>", " ", html).lower()))
    return found | {word.removesuffix("s") for word in found}


def _picture(light: bytes, dark: bytes) -> dict[str, Any]:
    width = int.from_bytes(light[16:20], "big") * 96 // DOTS_PER_INCH  # a PNG's header has its width in pixels here
    uris = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark))
    return {"width": width, **dict(zip(("light", "dark"), uris))}


def bars(title: str, counts: Mapping[str, int]) -> Table:
    """Counts by name, with a bar each."""
    most = max(counts.values(), default=0) or 1
    return Table(
        [title, "#Count", "|"],
        [
            [name, number(count), Cell(look="bar", share=round(100 * count / most, 1))]
            for name, count in counts.items()
        ],
    )


def shaded(text: str, value: float, most: float, look: str = "shade") -> Cell:
    """A cell whose colour deepens with its value."""
    return Cell(text=text, look=look, share=round(_DEEPEST * value / most) if most else 0)


def with_interval(figures: Mapping[str, Any], key: str, sign: bool = False) -> Cell:
    """A figure with its "interval" in small below it."""
    bounds = interval(figures.get("interval"), sign=sign)
    return Cell(text=number(figures.get(key), sign=sign), small="" if bounds == NOTHING else bounds)


def settings_part(data: Mapping[str, Any]) -> dict[str, Any]:
    """The part "settings", which every template shows last: `seed`, `settings` and `versions` of the data."""
    settings = [[Cell(text=key, look="code"), Cell(text=one, look="code")] for key, one in _flat(data["settings"])]
    versions = [[name, str(one)] for name, one in (data.get("versions") or {}).items()]
    return {
        "seed": str(data.get("seed", NOTHING)),
        "settings": Table(["Setting", "Value"], settings),
        "versions": Table(["Package", "Version"], versions),
    }


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))]
