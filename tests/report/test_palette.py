"""The colours can be told apart, by colour-blind eyes too, and read on. Measured here independently."""

import itertools

import numpy as np
import pytest

from switchmoe.report import palette

# Machado, Oliveira & Fernandes 2009, severity 1, in linear light.
SIGHT = {
    "normal": np.eye(3),
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
WHITE, LIGHT_INK, DARK_PAPER = "#ffffff", "#1a1c21", "#14171c"  # As in templates/style.css.


def linear(colour):
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """WCAG 2.1's contrast ratio."""
    light, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def cie_lab(rgb):
    """CIE 1976 L*a*b* under D65: another space than the one the colours were searched in."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours, sight):
    seen = [cie_lab(np.clip(np.array(SIGHT[sight]) @ linear(colour), 0, 1)) for colour in colours]
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_expert_colours_stay_apart(sight):
    # A difference of 2.3 is just noticeable side by side: five times that for 8 experts, three times for 16.
    # (Okabe & Ito's eight, with a grey for the black one cannot read on, come to 7.1 for a deuteranope.)
    assert closest(palette.expert_colours(8), sight) > 11.5
    assert closest(palette.expert_colours(16), sight) > 6.9


def test_the_measure_finds_a_bad_pair():
    # Red and green of one lightness: apart for most eyes, together for a deuteranope.
    assert closest(["#c06060", "#7b7b3d"], "normal") > 20
    assert closest(["#c06060", "#7b7b3d"], "deuteranope") < 15


@pytest.mark.parametrize("num_experts", [1, 8, 9, 16, 17, 64, 256])
def test_one_colour_an_expert_with_readable_text(num_experts):
    colours = palette.expert_colours(num_experts)
    assert len(colours) == num_experts
    # Light page: dark text on the colour. Dark page: text in the colour on the paper.
    assert min(contrast(colour, LIGHT_INK) for colour in colours) > 4.5
    assert min(contrast(colour, DARK_PAPER) for colour in colours) > 4.5


def test_arm_colours_stand_out_from_the_page():
    for on_white, on_dark in palette.ARMS:
        assert contrast(on_white, WHITE) > 4.5
        assert contrast(on_dark, DARK_PAPER) > 4.5


def test_channels():
    assert palette.channels("#ff8000") == "255 128 0"
