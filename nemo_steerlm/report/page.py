"""A page that needs nothing but itself: the shell around sections, tables, pictures as data, light and dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nemo_steerlm.files import atomic_writer
from nemo_steerlm.report.canvas import DOTS_PER_INCH
from nemo_steerlm.report.tables import NOTHING, interval, number

Pictures = Mapping[str, tuple[bytes, bytes]]  # PNG bytes for a light and a dark page


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


def render(title: str, lead: str, parts: Sequence[tuple[str, str, str]]) -> str:
    """Render the page.

    Args:
        title: plain text.
        lead: plain text below it.
        parts: anchor, title and body of each section, all HTML.
    """
    title = escape(title)
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in parts)
    sections = "".join(f'<section id="{key}"><h2>{name}</h2>{body}</section>\n' for key, name, body in parts)
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Texts a model made stand on this page: even if one slipped through unescaped, nothing would run or load.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{title}</h1><p class="lead">{escape(lead)}</p></header>\n<nav>{links}</nav>\n'
        f"{sections}<footer>All figures are in <code>report.json</code>, the pictures beside this page.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; # before a header makes a column of numbers, | one of bars."""
    looks = {"#": ' class="number"', "|": ' class="track"'}
    classes = [looks.get(header[:1], "") for header in headers]
    head = "".join(f"<th{look} scope=col>{header.lstrip('#|')}</th>" for header, look in zip(headers, classes))
    body = ""
    for row in rows:
        first, *rest = (f"{look}>{cell}" for cell, look in zip(row, classes))
        body += f"<tr><th scope=row{first}</th>" + "".join(f"<td{cell}</td>" for cell in rest) + "</tr>"
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(alt: str, pair: tuple[bytes, bytes] | None) -> str:
    """An HTML figure that follows the page into the dark; nothing where there is no picture."""
    if pair is None:
        return ""
    width = int.from_bytes(pair[0][16:20], "big") * 96 // DOTS_PER_INCH  # a PNG's header has its width in pixels here
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in pair)
    return (
        '<figure><div class="wide" tabindex="0"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" width="{width}" style="--width: {width}px" alt="{escape(alt)}"></picture></div></figure>'
    )


def with_interval(figures: Mapping[str, Any], key: str, sign: bool = False) -> str:
    """A figure with its "interval" in small below it."""
    bounds = interval(figures.get("interval"), sign=sign)
    return number(figures.get(key), sign=sign) + (f"<small>{bounds}</small>" if bounds != NOTHING else "")


def settings_section(data: Mapping[str, Any]) -> tuple[str, str]:
    """The section of `seed`, `settings` and `versions`, as text and body."""
    rows = [[f"<code>{escape(key)}</code>", f"<code>{escape(value)}</code>"] for key, value in _flat(data["settings"])]
    versions = [[escape(name), escape(str(one))] for name, one in (data.get("versions") or {}).items()]
    body = f"<details><summary>{len(rows)} settings</summary>{table(['Setting', 'Value'], rows)}</details>"
    if versions:
        body += f"<h3>Versions</h3>{table(['Package', 'Version'], versions)}"
    return f"<p>Seed {escape(str(data.get('seed', NOTHING)))}.</p>", body


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))]
