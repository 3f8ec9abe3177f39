"""Colours: one an expert, made for coloured text, and a few for the arms of a comparison.

The two tables were found by farthest-point search in OKLab over the colours on which near-black text has a
contrast of 6 or more, with the smallest distance taken over normal, deuteranope and protanope sight (Machado,
Oliveira & Fernandes 2009). A test measures them again. Above 16 experts colour alone cannot tell them
apart: the hues then go round by the golden angle, and the page says to use the legend.
"""

import colorsys

EIGHT = ("#f3bc40", "#a686fc", "#b3e2fd", "#9ea285", "#faf65e", "#ed7b15", "#32e7a3", "#56c3dc")
SIXTEEN = (
    "#c2bef9", "#faf65e", "#ed7b15", "#a686fc", "#dd7b9b", "#67e489", "#fbc91e", "#baf9a5",
    "#7fa3c3", "#99e2c5", "#fba645", "#d6a597", "#b3e2fd", "#6dc2c5", "#a3a364", "#c69cf2",
)  # fmt: skip

GOLDEN_ANGLE = 0.381966  # Of a full turn.

# (on white, on near-black): vermilion, blue, green and purple after Okabe & Ito, each 4.5 : 1 or better.
ARMS = (
    ("#b34a00", "#f0a35e"),
    ("#0067a3", "#63bdf2"),
    ("#007a59", "#3fcfa5"),
    ("#9c4a7c", "#e3a3c9"),
)


def expert_colours(num_experts: int) -> list[str]:
    """One colour an expert, dark text on each of them readable."""
    if num_experts <= len(EIGHT):
        return list(EIGHT[:num_experts])
    if num_experts <= len(SIXTEEN):
        return list(SIXTEEN[:num_experts])
    return [_turn(i) for i in range(num_experts)]


def _turn(i: int) -> str:
    red, green, blue = colorsys.hls_to_rgb(i * GOLDEN_ANGLE % 1, (0.74, 0.84, 0.79)[i % 3], 0.7)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def channels(colour: str) -> str:
    """'#ff8000' as '255 128 0', the form in which CSS can add an opacity."""
    return " ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
