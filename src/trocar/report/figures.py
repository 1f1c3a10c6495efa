"""Figures as inline SVG with hover text, in the page's own colours, the same bytes for the same data. Floor 6.

matplotlib draws with marker colours that no figure uses otherwise; they become CSS variables, so that one drawing serves light, dark
and print.
To add a kind of figure: a function here, its name in KINDS and in `trocar.result.FigureInfo`.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from trocar.core.errors import RunError
from trocar.report.numbers import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 8
COLOURS = {
    "#010203": "var(--soft)",
    "#010204": "var(--line)",
    "#010205": "var(--surface)",
    "#010206": "var(--heat)",
    "#010207": "var(--cold)",
    "#010208": "var(--ink)",
    **{f"#0a0b{number:02x}": f"var(--s{number})" for number in range(1, SERIES + 1)},
}
SOFT, LINE, SURFACE, HEAT, COLD, INK = list(COLOURS)[:6]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
RC: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "trocar", "font.size": 10, "lines.linewidth": 1.8, "axes.unicode_minus": True,
    "text.color": SOFT, "axes.labelcolor": SOFT, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
    "xtick.color": LINE, "ytick.color": LINE,
    "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": LINE, "grid.linewidth": 0.6, "axes.facecolor": "none", "figure.facecolor": "none",
}  # fmt: skip
SVG = "http://www.w3.org/2000/svg"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Key:
    """One line of a legend: the series' name, its number (1..8, for the colour) and its marker (for those who do not see colours)."""

    name: str
    number: int
    marker: str


@dataclass(frozen=True)
class Drawing:
    """svg: the figure; keys: its legend; scale: lowest and highest value of a heat map and its shades: `` (0 or the lowest value up),
    `cold` (up to 0) or `diverging` (both sides of 0)."""

    svg: str
    keys: tuple[Key, ...] = ()
    scale: tuple[str, str, str] | None = None


def draw(name: str, kind: str, rows: Rows, x: str, y: str, value: str | None = None, series: str | None = None) -> Drawing:
    """Draw the rows of a figure (`trocar.method.Figure` says what each kind needs). Raises RunError for missing columns or no rows."""
    needed = [x, y, *(["value" if value is None else value] if kind == "heatmap" else []), *([series] if series else [])]
    if not rows:
        raise RunError(f"Figure '{name}' has no rows.", "Run its recipe again.")
    missing = [column for column in needed if column not in rows[0]]
    if missing:
        raise RunError(f"Figure '{name}' lacks the column {', '.join(missing)}; it has {', '.join(rows[0])}.", "Run its recipe again.")
    return KINDS[kind](name, rows, x, y, value or series)


def number(text: Any) -> float:
    """A cell of a CSV as a number, NaN if it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return float("nan")


def _canvas(name: str, height: float, paint: Callable[[Axes], dict[str, list[str]]], width: float = 7.4) -> str:
    """An SVG: `paint` draws on the axes and returns the hover texts of each group of marks, by the group's id."""
    import matplotlib
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context("default"), matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        titles = paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(name, buffer.getvalue(), titles)


def _inline(name: str, svg: str, titles: Mapping[str, list[str]]) -> str:
    """The drawing without prologue and fixed size, with its ids made unique in the page, hover texts added and colours as variables."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for mark in root.findall(f"{{{SVG}}}metadata"):
        root.remove(mark)
    for group in root.iter(f"{{{SVG}}}g"):
        texts = titles.get(group.get("id", ""))
        if texts is None:
            continue
        hidden = {id(part) for defs in group.iter(f"{{{SVG}}}defs") for part in defs.iter()}
        marks = [part for part in group.iter() if part.tag in (f"{{{SVG}}}use", f"{{{SVG}}}path") and id(part) not in hidden]
        for mark, text in zip(marks, texts, strict=True):
            ElementTree.SubElement(mark, f"{{{SVG}}}title").text = text
            mark.set("class", "mark")
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", name)
    text = ElementTree.tostring(root, encoding="unicode")
    prefix = re.sub(r"\W", "-", name)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    return re.sub("|".join(COLOURS), lambda found: COLOURS[found.group()], text)


def _series(rows: Rows, column: str | None) -> dict[str, list[Mapping[str, Any]]]:
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(str(row[column]) if column else "", []).append(row)
    return parts


def _colour(place: int) -> str:
    return f"#0a0b{place % SERIES + 1:02x}"


def _keys(parts: Mapping[str, Any]) -> tuple[Key, ...]:
    signs = ("●", "■", "▲", "◆", "▼", "✚", "✖", "⬢")
    strokes = ("", "╌", "┈")  # further rounds of the colours have other lines
    return tuple(
        Key(part, place % SERIES + 1, signs[place % SERIES] + strokes[place // SERIES % 3]) for place, part in enumerate(parts) if part
    )


def _ticks(axes: Axes, values: Sequence[Any]) -> dict[str, float]:
    """Places of x values: the numbers themselves, or 0, 1, 2, ... with the texts as tick labels."""
    texts = list(dict.fromkeys(str(value) for value in values))
    if all(not math.isnan(number(text)) for text in texts):
        return {text: number(text) for text in texts}
    _name_columns(axes, texts, 0.0)
    return {text: float(place) for place, text in enumerate(texts)}


def _name_columns(axes: Axes, texts: Sequence[str], shift: float) -> None:
    """Tick labels under columns at shift, shift + 1, ...: as they are, else broken into lines, else slanted; where there are too many even
    for that, or all are numbers, every second, third, ..."""
    step, shown, slanted = _fitted(tuple(texts))
    axes.set_xticks([shift + place for place in range(0, len(texts), step)], shown[::step])
    if slanted:
        axes.tick_params("x", rotation=35)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")


def _fitted(texts: Sequence[str]) -> tuple[int, Sequence[str], bool]:
    """(every which label is shown, the labels, whether they are slanted)."""
    room, longest = 84 / len(texts), max(map(len, texts))  # characters under a column
    counted = all(not math.isnan(number(text.lstrip("LH"))) for text in texts)
    if longest + 1 <= room or counted or room < 2:
        return (max(1, math.ceil((longest + 2) / room)) if len(texts) > 1 else 1), texts, False
    broken = ["\n".join(textwrap.wrap(text, max(6, int(room) - 1))) or text for text in texts]
    if room >= 8 and all(len(line) < room and text.count("\n") < 3 for text in broken for line in text.split("\n")):
        return 1, broken, False
    return 1, [text if len(text) <= 28 else f"{text[:27]}…" for text in texts], True


def _slant_height(texts: Sequence[str]) -> float:
    """Inches that slanted labels take below the axis."""
    _, shown, slanted = _fitted(texts)
    return 0.045 * max(map(len, shown)) if slanted else 0.0


def _small(axes: Axes, side: str, values: Sequence[float], label: str) -> None:
    """Label a value axis; numbers that are all below a thousandth get their power of ten into the label instead of a row of zeros."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    axis = axes.yaxis if side == "y" else axes.xaxis
    axis.set_label_text(label)
    if 0 < largest < 1e-3:
        power = math.floor(math.log10(largest))
        axis.set_major_formatter(lambda value, _: f"{value / 10**power:.3g}".replace("-", "−"))
        axis.set_label_text(f"{label} (× 10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))})")


def _curve(name: str, rows: Rows, x: str, y: str, series: str | None) -> Drawing:
    parts = _series(rows, series)

    def paint(axes: Axes) -> dict[str, list[str]]:
        places, titles = _ticks(axes, [row[x] for row in rows]), {}
        for order, (part, own) in enumerate(parts.items()):
            own = sorted((row for row in own if not math.isnan(number(row[y]))), key=lambda row: places[str(row[x])])
            xs, ys = [places[str(row[x])] for row in own], [number(row[y]) for row in own]
            if own and "low" in own[0] and "high" in own[0]:
                low, high = ([number(row[side]) for row in own] for side in ("low", "high"))
                axes.fill_between(xs, low, high, color=_colour(order), alpha=0.15, linewidth=0)
            axes.plot(xs, ys, color=_colour(order), linestyle=("-", "--", ":")[order // SERIES % 3])
            gid = f"marks{order}"
            axes.scatter(
                xs,
                ys,
                36 if len(rows) <= 120 else 16,
                c=_colour(order),
                marker=MARKERS[order % SERIES],
                edgecolors=SURFACE,
                linewidths=1,
                zorder=3,
                gid=gid,
            )
            titles[gid] = [_hover(part, x, y, row) for row in own]
        axes.set(xlabel=x)
        _small(axes, "y", [number(row[y]) for row in rows], y)
        return titles

    texts = list(dict.fromkeys(str(row[x]) for row in rows))
    return Drawing(_canvas(name, 3.4 + _slant_height(texts), paint), _keys(parts))


def _points(name: str, rows: Rows, x: str, y: str, series: str | None) -> Drawing:
    parts = _series(rows, series)

    def paint(axes: Axes) -> dict[str, list[str]]:
        places, titles = _ticks(axes, [row[x] for row in rows]), {}
        for order, (part, own) in enumerate(parts.items()):
            own = [row for row in own if not math.isnan(number(row[y]))]
            gid = f"marks{order}"
            xs, ys = [places[str(row[x])] for row in own], [number(row[y]) for row in own]
            axes.scatter(xs, ys, 56, c=_colour(order), marker=MARKERS[order % SERIES], edgecolors=SURFACE, linewidths=1, gid=gid)
            titles[gid] = [_hover(part, x, y, row) for row in own]
            for row, at, height in zip(own, xs, ys, strict=True):
                if len(rows) <= 24 and row.get("label"):
                    axes.annotate(str(row["label"]), (at, height), xytext=(6, 4), textcoords="offset points", fontsize=8)
        _small(axes, "x", list(places.values()), x)
        _small(axes, "y", [number(row[y]) for row in rows], y)
        axes.margins(0.08)
        return titles

    return Drawing(_canvas(name, 3.8, paint), _keys(parts))


def _bars(name: str, rows: Rows, x: str, y: str, series: str | None) -> Drawing:
    parts, labels = _series(rows, series), list(dict.fromkeys(str(row[x]) for row in rows))
    flat = len(labels) * len(parts) > 12 or max(map(len, labels)) > 72 / len(labels)  # lying bars, where labels would collide

    def paint(axes: Axes) -> dict[str, list[str]]:
        titles, thick = {}, 0.8 / len(parts)
        axes.grid(False, axis="y" if flat else "x")
        for order, (part, own) in enumerate(parts.items()):
            own = [row for row in own if not math.isnan(number(row[y]))]
            at = [labels.index(str(row[x])) + (order - (len(parts) - 1) / 2) * thick for row in own]
            heights = [number(row[y]) for row in own]
            bars = (axes.barh if flat else axes.bar)(at, heights, thick * 0.9, color=_colour(order))
            for place, (bar, row) in enumerate(zip(bars, own, strict=True)):
                bar.set_gid(f"bar{order}-{place}")
                titles[f"bar{order}-{place}"] = [_hover(part, x, y, row)]
            if own and "low" in own[0] and "high" in own[0]:
                ends = [
                    [max(0.0, height - number(row["low"])), max(0.0, number(row["high"]) - height)]
                    for row, height in zip(own, heights, strict=True)
                ]
                spread: Any = [[0.0 if math.isnan(end[side]) else end[side] for end in ends] for side in (0, 1)]
                if flat:
                    axes.errorbar(heights, at, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
                else:
                    axes.errorbar(at, heights, yerr=spread, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
        axes.tick_params("y" if flat else "x", length=0)
        if flat:
            axes.set_yticks(range(len(labels)), labels)
            axes.invert_yaxis()
            axes.set(ylabel=x if len(labels) > 1 else "")
        else:
            axes.set_xticks(range(len(labels)), labels)
            axes.set(xlabel=x if len(labels) > 1 else "")
        _small(axes, "x" if flat else "y", [number(row[y]) for row in rows], y)
        return titles

    return Drawing(
        _canvas(name, max(2.4, 0.26 * len(labels) * len(parts) + 1) if flat else 3.2, paint),
        tuple(replace(key, marker="■") for key in _keys(parts)),
    )


def _heatmap(name: str, rows: Rows, x: str, y: str, value: str | None) -> Drawing:
    key = value or "value"
    columns, lines = (list(dict.fromkeys(str(row[side]) for row in rows)) for side in (x, y))
    numbers = [number(row[key]) for row in rows]
    finite = [item for item in numbers if math.isfinite(item)]
    if not finite:
        raise RunError(f"Figure '{name}' has no finite value.", "Run its recipe again.")
    low, high = min(finite), max(finite)
    first = [text.split("–")[0] or text for text in columns]  # the first of a cell of several
    diverging, cold = low < 0 < high, low < 0 >= high
    reach = max(abs(low), abs(high)) or 1.0  # shades start at 0

    def paint(axes: Axes) -> dict[str, list[str]]:
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba

        squares, shades, texts = [], [], []
        places = {text: place for place, text in enumerate(columns)}, {text: place for place, text in enumerate(lines)}
        for row, item in zip(rows, numbers, strict=True):
            left, top = places[0][str(row[x])], places[1][str(row[y])]
            squares.append([(left, top), (left + 1, top), (left + 1, top + 1), (left, top + 1)])
            level = abs(item) / reach if math.isfinite(item) else 0.0
            shades.append(to_rgba(COLD if item < 0 else HEAT, round(0.03 + 0.97 * level, 3)))
            texts.append(
                f"{row[y]}, {x} {row[x]}: {key} {compact(item) if math.isfinite(item) else 'none'}"
                + (f" ({row['note']})" if row.get("note") else "")
            )
        gap = 0.6 if len(columns) <= 40 else 0.25
        axes.add_collection(PolyCollection(squares, facecolors=shades, edgecolors=SURFACE, linewidths=gap, gid="cells"))
        axes.set(xlim=(0, len(columns)), ylim=(len(lines), 0), xlabel=x, ylabel=y)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _name_columns(axes, first, 0.5)
        step = max(1, math.ceil(len(lines) / 24))
        axes.set_yticks([place + 0.5 for place in range(0, len(lines), step)], lines[::step])
        return {"cells": texts}

    return Drawing(
        _canvas(name, min(6.5, 0.9 + 0.26 * len(lines)) + _slant_height(first), paint),
        scale=(compact(-reach if low < 0 else 0), compact(0 if cold else reach), "diverging" if diverging else "cold" if cold else ""),
    )


def _hover(part: str, x: str, y: str, row: Mapping[str, Any]) -> str:
    ends = f" [{compact(number(row['low']))}, {compact(number(row['high']))}]" if "low" in row and "high" in row else ""
    where = compact(number(row[x])) if not math.isnan(number(row[x])) else str(row[x])
    head = ", ".join(text for text in (part, str(row.get("label") or "")) if text)
    return f"{head}{': ' if head else ''}{x} {where}, {y} {compact(number(row[y]))}{ends}"


KINDS: dict[str, Callable[[str, Rows, str, str, str | None], Drawing]] = {
    "heatmap": _heatmap,
    "curve": _curve,
    "bars": _bars,
    "points": _points,
}
