"""Labels of points, placed where they cover neither points nor each other."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from gradiometer.bench.canvas import VEIL

__all__ = ["place_labels"]

_RADII = (7.0, 13.0, 21.0, 31.0, 43.0)  # points
_SIZE = 7.0  # of the letters, in points
_ANGLES = tuple(math.radians(angle) for angle in (0, 180, 90, 270, 35, 145, 325, 215))


def place_labels(
    axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], lines: Sequence[Any] = ()
) -> None:
    """Write each text near its point, nearest free place first, with a thin line to the point where it had to go far.

    Args:
        axes: laid out already: matplotlib axes whose limits, size and position do not change any more.
        points: in data coordinates.
        texts: one per point.
        lines: matplotlib lines that no label should cover; drawn as steps, if they are.
    """
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    pixels = [tuple(map(float, axes.transData.transform(point))) for point in points]
    inside = axes.get_window_extent(renderer)
    taken = [_around(x, y, 4 * scale, 4 * scale) for x, y in pixels]
    taken += [_around(*dot, 2 * scale, 2 * scale) for line in lines for dot in _dots(line, 3 * scale)]
    for number in sorted(
        range(len(points)), key=lambda i: pixels[i], reverse=True
    ):  # the rightmost takes its right side
        x, y = pixels[number]
        probe = axes.text(0, 0, texts[number], fontsize=_SIZE)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        width, height = extent.width / 2 + scale, extent.height / 2
        best, where, far = math.inf, (0.0, 0.0), False
        for radius in _RADII:
            for angle in _ANGLES:
                dx, dy = math.cos(angle), math.sin(angle)
                centre = (x + dx * (radius * scale + width), y + dy * (radius * scale + height))
                box = _around(*centre, width, height)
                cost = sum(_overlap(box, other) for other in taken) + 3 * _outside(box, inside) + radius
                if cost < best - 1e-9:
                    best, where, far = cost, centre, radius > _RADII[0]
        taken.append(_around(*where, width, height))
        line = {"arrowstyle": "-", "color": "0.55", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3} if far else None
        offset = ((where[0] - x) / scale, (where[1] - y) / scale)
        axes.annotate(
            texts[number],
            points[number],
            offset,
            textcoords="offset points",
            fontsize=_SIZE,
            ha="center",
            va="center",
            arrowprops=line,
            bbox=VEIL,
        )


def _dots(line: Any, apart: float) -> Iterator[tuple[float, float]]:
    """Points along a line as it is drawn, in pixels."""
    path = line.get_transform().transform_path(line.get_path())
    corners = [tuple(map(float, corner)) for corner in path.vertices]
    if line.get_drawstyle() == "steps-post":
        corners = (
            [corners[0], *(dot for a, b in itertools.pairwise(corners) for dot in ((b[0], a[1]), b))] if corners else []
        )
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        steps = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / apart))
        yield from ((x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1))


def _around(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return (x - width, y - height, x + width, y + height)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area two boxes share, in pixels."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: tuple[float, ...], inside: Any) -> float:
    """The area of a box that lies outside the axes, in pixels."""
    within = _overlap(box, (inside.x0, inside.y0, inside.x1, inside.y1))
    return (box[2] - box[0]) * (box[3] - box[1]) - within
