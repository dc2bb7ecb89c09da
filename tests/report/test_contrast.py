"""Figures on coloured ground can be read: WCAG 2.2 asks for a contrast of 4.5 to 1."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nemo_steerlm.report import page
from nemo_steerlm.report.canvas import DARK, LIGHT, Theme, readable_on
from nemo_steerlm.report.pictures import slope_colours

LEAST = 4.5
CSS = (Path(page.__file__).parent / "templates" / "report.css").read_text()


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def contrast(first: np.ndarray, second: np.ndarray) -> float:
    def luminance(colour: np.ndarray) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def palettes() -> list[dict[str, str]]:
    """The colours of the style sheet by name: on a light page, on a dark one."""
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in CSS.split("@media")[:2])
    return [light, {**light, **dark}]


def test_the_contrast_is_that_of_the_standard() -> None:
    assert contrast(rgb("#000000"), rgb("#ffffff")) == pytest.approx(21)
    assert contrast(rgb("#777777"), rgb("#ffffff")) == pytest.approx(4.478, abs=1e-3)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_figures_of_the_cross_talk(theme: Theme) -> None:
    colours = slope_colours(theme)(np.append(np.linspace(-1.5, 1.5, 601), np.nan))
    assert colours.shape == (602, 4) and (colours[:, 3] == 1).all()
    np.testing.assert_allclose(colours[-1, :3], rgb(theme.page), atol=1e-6)  # no figure, no colour
    assert min(contrast(rgb(readable_on(colour)), colour[:3]) for colour in colours) >= LEAST


def test_black_or_white_is_readable_on_any_colour() -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 17)] * 3), axis=-1).reshape(-1, 3)
    assert min(contrast(rgb(readable_on(colour.tolist())), colour) for colour in grid) >= LEAST


@pytest.mark.parametrize("colours", palettes(), ids=["light", "dark"])
def test_figures_of_shaded_cells_and_verdicts(colours: dict[str, str]) -> None:
    ink, card = rgb(colours["ink"]), rgb(colours["card"])
    deepest = page.shaded("", 1, 1).share
    assert deepest is not None
    for colour in ("accent", "bad"):
        for share in np.arange(0, deepest + 1) / 100:
            assert contrast(ink, share * rgb(colours[colour]) + (1 - share) * card) >= LEAST, (colour, share)
    for text, ground in (
        ("ink", "card"), ("quiet", "card"), ("quiet", "page"), ("accent", "card"), ("good", "good-back"),
        ("bad", "bad-back"), ("quiet", "neutral-back"),
    ):  # fmt: skip
        assert contrast(rgb(colours[text]), rgb(colours[ground])) >= LEAST, (text, ground)
