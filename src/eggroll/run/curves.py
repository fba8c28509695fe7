"""The curves of a run as SVG, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eggroll._optional import require
from eggroll.run.metrics import METRICS, series

COLOUR = "#2f6db5"
OTHER = "#c8692b"
LARGE = (6.0, 3.0)
SMALL = (3.6, 2.2)
"""Inches; the page scales the drawing to its column."""
LARGEST = 1e300
"""Numbers from here on are not drawn: the length of an axis would be infinite."""
MAX_OWN = 12
"""Curves of keys that eggroll does not know (a reward's parts, say) that are drawn at most."""


@dataclass(frozen=True)
class Measure:
    """What the held-out data say about a run.

    Attributes:
        key: of ``metrics.jsonl``.
        short: its name.
        label: of its drawing.
        higher: whether higher is better.
    """

    key: str
    short: str
    label: str
    higher: bool = True


REWARD = Measure("heldout_reward", "held-out reward", METRICS["heldout_reward"].label)
BITS = Measure("validation_bits_per_byte", "bits per byte", "bits per byte of held-out text (lower is better)", False)
"""A language model from scratch: there the reward is minus these bits."""


def heldout_measure(metrics: Sequence[Mapping[str, Any]]) -> Measure:
    """The measure that a person expects of such a run."""
    return BITS if series(metrics, BITS.key)[0] else REWARD


@dataclass(frozen=True)
class Curve:
    """One drawing: its title, the ``<svg>`` element, and whether it is one to look at first."""

    title: str
    svg: str
    main: bool = False


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Drawings of everything that was measured: the held-out score and fitness first and larger.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", extra="llm")
    metrics = [{key: _drawable(value) for key, value in line.items()} for line in metrics]
    found = []
    measure = heldout_measure(metrics)
    if series(metrics, measure.key)[0]:
        found.append(_heldout(metrics, measure))
    if series(metrics, "fitness_mean")[0]:
        found.append(_fitness(metrics))
    large = {"heldout_reward", "fitness_mean", "fitness_max", "fitness_min", "fitness_std", "elapsed_s"}
    own = [key for key in _numeric_keys(metrics) if key not in METRICS and key != measure.key][:MAX_OWN]
    for key in [*(key for key in METRICS if key not in large), *own]:
        generations, values = series(metrics, key)
        if generations and not (key == "invalid_scores" and not any(values)):
            label = METRICS[key].label if key in METRICS else key
            found.append(_simple(label, generations, values))
    return found


def _drawable(value: Any) -> Any:
    """``None`` in the place of a number that axes have no room for."""
    return None if isinstance(value, int | float) and not abs(value) < LARGEST else value


def _numeric_keys(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for line in metrics for key in line if key != "generation")
    return [key for key in keys if series(metrics, key)[0]]


def _heldout(metrics: Sequence[Mapping[str, Any]], measure: Measure) -> Curve:
    generations, values = series(metrics, measure.key)
    figure, axes = _axes(LARGE)
    axes.axhline(values[0], color="#9aa3b0", linewidth=0.9, linestyle="--", label="at the start")
    axes.plot(generations, values, color=OTHER, linewidth=1.6, marker="o", markersize=3, label=measure.short)
    axes.legend(frameon=False, fontsize=8)
    return _finish(figure, axes, measure.label, main=True)


def _fitness(metrics: Sequence[Mapping[str, Any]]) -> Curve:
    generations, mean = series(metrics, "fitness_mean")
    figure, axes = _axes(LARGE)
    for low, high, shade, label in (
        ("fitness_min", "fitness_max", 0.12, "worst to best member"),
        ("-std", "+std", 0.25, "one standard deviation"),
    ):
        band = [
            (line["generation"], *edges)
            for line in metrics
            if line.get("fitness_mean") is not None and (edges := _edges(line, low, high)) is not None
        ]
        if band:
            axes.fill_between(*zip(*band, strict=True), color=COLOUR, alpha=shade, linewidth=0, label=label)
    axes.plot(generations, mean, color=COLOUR, linewidth=1.6, label="mean", marker="o" if len(mean) == 1 else None)
    axes.legend(frameon=False, fontsize=8)
    return _finish(figure, axes, "fitness of the population", main=True)


def _edges(line: Mapping[str, Any], low: str, high: str) -> tuple[float, float] | None:
    if low == "-std":
        std = line.get("fitness_std")
        return None if std is None else (line["fitness_mean"] - std, line["fitness_mean"] + std)
    if line.get(low) is None or line.get(high) is None:
        return None
    return line[low], line[high]


def _simple(label: str, generations: list[int], values: list[float]) -> Curve:
    figure, axes = _axes(SMALL)
    axes.plot(generations, values, color=COLOUR, linewidth=1.3, marker="o" if len(values) == 1 else None)
    return _finish(figure, axes, label)


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", extra="llm").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e8ebf0", linewidth=0.7)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _finish(figure: Any, axes: Any, title: str, *, main: bool = False) -> Curve:
    matplotlib = require("matplotlib", extra="llm")
    axes.set_title(title, fontsize=9.5, loc="left", parse_math=False)
    axes.set_xlabel("generation", fontsize=8)
    buffer = io.StringIO()
    # text stays text (small, selectable); the salt keeps ids of the drawings in one page apart and the same each time
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return Curve(title, svg[svg.index("<svg") :], main)
