"""What the explorer paints: panels and thumbnails as PNG, the curve as SVG in the colors of the page."""

import base64
import io
from collections.abc import Callable
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from lib.wording import format_epsilon

HEIGHT, GAP = 224, 8  # of a picture on the screen, and between two, in pixels
THUMBNAIL = 56
FRAMED = "explorer-chosen"
FRAME = f".{FRAMED} {{ outline: 3px solid var(--jp-brand-color1, #1976d2); }}"


class Axis(NamedTuple):
    """The stops of the slider. stops: as the attack takes them; unit: 1 in the text box is 1 / unit of an attack's.

    turned, typed, label: the words at slider, text box and curve; ticks: of the curve, in units; words: a stop's, a format.
    """

    stops: tuple
    unit: float
    turned: str
    typed: str
    label: str
    ticks: tuple
    words: Callable

    def name(self, k):
        """Stop k in words."""
        return self.words(self.stops[k])

    def nearest(self, value):
        """The stop nearest to a value."""
        return int(np.abs(np.array(self.stops) - value).argmin())


EPSILON = Axis(
    tuple(k / 2 / 255 for k in range(33)),
    255,
    "epsilon",
    "in 255ths",
    "epsilon (gray levels of 255)",
    (0, 4, 8, 12, 16),
    format_epsilon,
)
SIGMA = Axis(
    tuple(k / 100 for k in range(33)),
    1,
    "sigma",
    "of the range 0 to 1",
    "sigma of the noise (of the range 0 to 1)",
    (0, 0.1, 0.2, 0.3),
    "sigma {:.2f}".format,
)


def to_bytes(values):
    """float in [0, 1] as uint8."""
    return (values * 255).round().astype(np.uint8)


def picture(rows):
    """Rows of panels as the bytes of a PNG, enlarged by a whole factor to at least `HEIGHT`, the gaps transparent.

    rows: lists of float arrays (H, W, 3) in [0, 1], or None for an empty place.
    """
    count, size = max(map(len, rows)), rows[0][0].shape[0]
    factor = -(-HEIGHT // size)
    side = factor * size
    canvas = np.zeros((len(rows) * (side + GAP) - GAP, count * (side + GAP) - GAP, 4), np.uint8)
    for top, panels in enumerate(rows):
        for left, panel in enumerate(panels):
            if panel is None:
                continue
            place = canvas[top * (side + GAP) :, left * (side + GAP) :][:side, :side]
            place[..., :3], place[..., 3] = to_bytes(panel).repeat(factor, 0).repeat(factor, 1), 255
    drawn = io.BytesIO()
    Image.fromarray(canvas).save(drawn, "png", compress_level=1)
    return drawn.getvalue()


def heat(values, under=None):
    """float (H, W), at least 0, as colors (H, W, 3) in [0, 1], the largest brightest; half through where a picture is `under` it."""
    colors = matplotlib.colormaps["inferno"](values / (values.max() or 1))[..., :3]
    return colors if under is None else 0.4 * under.mean(2, keepdims=True) + 0.6 * colors


def thumbnail(pixels, of):
    """The CSS rule that paints an image, float (H, W, 3) in [0, 1], as a small square on what is of class `of`."""
    drawn, size = io.BytesIO(), f"{THUMBNAIL}px"
    small = Image.fromarray(to_bytes(pixels)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.save(drawn, "jpeg")
    address = f"data:image/jpeg;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    return f".{of} {{ width: {size}; height: {size}; background: url({address}) center / cover !important; }}"


def curve_svg(curves, axis, k, mark=None):
    """P(malignant) over the stops of an `Axis` as SVG text; a point at stop k, a dashed line at `mark`.

    curves: {name: (color, {stop: probability})}; what is not answered yet is left out. mark: (value, words), or None.
    """
    width, height, left, bottom, top = 460, 200, 44, 34, 18
    inside = width - left - 10, height - bottom - top

    def at(value, p):
        return left + value / axis.stops[-1] * inside[0], top + (1 - p) * inside[1]

    def text(x, y, words, anchor="middle"):
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="11" fill="currentColor">{words}</text>'

    def line(x1, y1, x2, y2, dash=""):
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" opacity=".4"{dash}/>'

    end = axis.stops[-1]
    parts = [
        line(*at(0, 0), *at(end, 0)),
        line(*at(0, 0), *at(0, 1)),
        line(*at(0, 0.5), *at(end, 0.5), ' stroke-dasharray="2 3"'),
        *(text(at(tick / axis.unit, 0)[0], height - 18, f"{tick:g}") for tick in axis.ticks),
        *(text(left - 6, at(0, p)[1] + 4, f"{p:g}", "end") for p in (0, 0.5, 1)),
        text(left + inside[0] / 2, height - 3, axis.label),
        f'<text transform="translate(11 {top + inside[1] / 2:.0f}) rotate(-90)" text-anchor="middle" font-size="11" '
        'fill="currentColor">P(malignant)</text>',
    ]
    if mark:
        x, y = at(mark[0], 1)
        parts += [line(x, y, *at(mark[0], 0), ' stroke-dasharray="6 3"'), text(x, y - 6, escape(mark[1]))]
    for color, curve in curves.values():
        points = " ".join(
            "{:.1f},{:.1f}".format(*at(axis.stops[stop], curve[stop])) for stop in sorted(curve)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        if k in curve:
            x, y = at(axis.stops[k], curve[k])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}" stroke="currentColor"/>')
    words = "; ".join(f"{name} {curve[k]:.2f}" for name, (_, curve) in curves.items() if k in curve)
    return (
        f'<svg width="{width}" viewBox="0 0 {width} {height}" style="max-width: 100%" role="img" '
        f'aria-label="P(malignant) at {axis.name(k)}: {escape(words)}">{"".join(parts)}</svg>'
    )
