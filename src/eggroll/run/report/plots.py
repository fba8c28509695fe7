"""What is plotted, as JSON that the page's script hands to plotly: values, names and places, no colors and no sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eggroll.run.metrics import METRICS
from eggroll.run.report.view import SECONDS, STEPS, Line, RunView

MAX_POINTS = 1500
"""Points of a curve; of longer runs every second, third, ... generation is drawn."""
MAX_OWN = 12
"""Curves of keys that eggroll does not know (a reward's parts, say) that are drawn at most."""
MIN, MAX, MEAN, STD = "fitness_min", "fitness_max", "fitness_mean", "fitness_std"
TAKEN = {
    *(MIN, MAX, MEAN, STD, "heldout_reward", "heldout_std", "validation_bits_per_byte", "invalid_scores", "elapsed_s"),
    *("generation", SECONDS, STEPS, "env_steps", "validation_bytes", "draw_s", "evaluate_s", "update_s", "scores"),
}
"""Keys that have a plot of another kind, or none."""
LABELS = {
    "episode_length_mean": "members' episodes, mean length in steps", "heldout_length_mean":
    "held-out episodes, mean length in steps", "ties": "pairs whose members score the same, share",
}  # fmt: skip
"""Of keys that one kind of run writes."""
BASELINES = (
    ("unigram_bits_per_byte", "bytes alone (unigram)"), ("bigram_bits_per_byte", "byte pairs (bigram)"),
    ("solved_return", "solved"),
)  # fmt: skip
"""Entries of ``result.json`` that a learning curve is compared with."""


@dataclass
class Plot:
    """One plot: its title, a sentence below it, its curves, horizontal lines, and whether to look at it first."""

    title: str
    note: str = ""
    traces: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    main: bool = False
    from_zero: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the page's script."""
        return {"traces": self.traces, "lines": self.lines, "zero": self.from_zero}


def plots(views: Sequence[RunView]) -> list[Plot]:
    """The plots of one run, or of several on the same axes; those to look at first come first."""
    found = [_heldout(views), _fitness(views), _single(views, STD, "spread: standard deviation of the members' scores")]
    found[2].note = "Without spread between members there is nothing to learn from a generation."
    found.append(_single(views, "update_norm", "step size: norm of the update"))
    found.append(_single(views, "update_cosine", METRICS["update_cosine"].label))
    found[
        -1
    ].note = (
        "Near 0: successive updates are unrelated. Above: they agree. Clearly below: the learning rate is too large."
    )
    found[-1].lines = [{"y": 0.0, "text": ""}] if found[-1].traces else []
    found += [_failed(views), _times(views)]
    keys = [key for key in METRICS if key not in TAKEN and not key.startswith("update_")]
    found += [_single(views, key, METRICS[key].label, _unit(key)) for key in keys if not _is_constant(views, key)]
    own = dict.fromkeys(key for view in views for line in view.metrics for key in line)
    own_keys = [
        key for key in own if key not in METRICS and key not in TAKEN and any(view.values(key) for view in views)
    ]
    found += [_single(views, key, LABELS.get(key, key)) for key in own_keys[:MAX_OWN]]
    return [plot for plot in found if any(trace["y"] for trace in plot.traces)]


def _is_constant(views: Sequence[RunView], key: str) -> bool:
    """Whether it is a setting that never changes, which the table of settings says better."""
    return key in ("sigma", "lr") and len({value for view in views for value in view.values(key)}) < 2


def _unit(key: str) -> float:
    return 2.0**30 if key.endswith("memory_bytes") else 1.0


def _places(lines: Sequence[Line]) -> dict[str, list[float]]:
    return {
        "generation": [line["generation"] for line in lines],
        "time": [round(line[SECONDS], 3) for line in lines],
        "steps": [line[STEPS] for line in lines],
    }


def _thin(lines: Sequence[Any]) -> list[Any]:
    """Every second, third, ... of too many; the last one stays."""
    step = -(-len(lines) // MAX_POINTS)
    kept = list(lines[::step]) if step > 1 else list(lines)
    return kept if not lines or kept[-1] is lines[-1] else [*kept, lines[-1]]


def _trace(lines: Sequence[Line], y: Sequence[float], name: str, color: int | str, **more: Any) -> dict[str, Any]:
    both = _thin(list(zip(lines, y, strict=True)))
    return {
        "x": _places([line for line, _ in both]),
        "y": [value for _, value in both],
        "name": name,
        "color": color,
    } | more


def _single(views: Sequence[RunView], key: str, title: str, unit: float = 1.0) -> Plot:
    plot = Plot(title.replace("bytes", "GiB") if unit != 1.0 else title, from_zero=unit != 1.0)
    for number, view in enumerate(views):
        lines, values = view.points(key)
        if lines:
            plot.traces.append(_trace(lines, [value / unit for value in values], view.name, number))
    return plot


def _heldout(views: Sequence[RunView]) -> Plot:
    measure = views[0].measure
    plot = Plot(measure.label, main=True)
    for number, view in enumerate(views):
        lines, values = view.points(measure.key)
        if lines:
            name = view.name if len(views) > 1 else measure.short
            plot.traces.append(_trace(lines, values, name, number, markers=True))
    if len(views) == 1 and plot.traces:
        if views[0].steps:
            _members(plot, views[0])
        plot.lines.append({"y": plot.traces[0]["y"][0], "text": "at the start"})
    known: dict[str, float] = {}
    for view in views:
        facts = {**view.run.environment, **view.result}
        known |= {text: float(facts[key]) for key, text in BASELINES if _fits(facts.get(key))}
    plot.lines += [{"y": value, "text": text} for text, value in known.items() if plot.traces]
    return plot


def _members(plot: Plot, view: RunView) -> None:
    """A learning curve of reinforcement learning has the members' returns beside the center's."""
    for key, text in ((MEAN, "members, mean"), (MAX, "members, best")):
        lines, values = view.points(key)
        if lines:
            plot.traces.append(_trace(lines, values, text, "dim" if key == MAX else 1, dash=key == MAX))


def _fits(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _fitness(views: Sequence[RunView]) -> Plot:
    plot = Plot("fitness of the population", main=True)
    for number, view in enumerate(views):
        lines, mean = view.points(MEAN)
        if len(views) == 1:
            for low, high, shade, text in (
                (_edge(MIN), _edge(MAX), 0.13, "worst to best"),
                (_around(-1), _around(1), 0.25, "one std. deviation"),
            ):
                band = [(line, low(line), high(line)) for line in lines]
                band = [edges for edges in band if edges[1] is not None and edges[2] is not None]
                if band:
                    plot.traces.append(
                        _trace([line for line, *_ in band], [edges[1] for edges in band], text, number, edge=True)
                    )
                    plot.traces.append(
                        _trace([line for line, *_ in band], [edges[2] for edges in band], text, number, fill=shade)
                    )
        if lines:
            plot.traces.append(_trace(lines, mean, "mean" if len(views) == 1 else view.name, number))
    return plot


def _edge(key: str) -> Any:
    return lambda line: line[key] if _fits(line.get(key)) else None


def _around(sign: int) -> Any:
    return lambda line: line[MEAN] + sign * line[STD] if _fits(line.get(STD)) else None


def _failed(views: Sequence[RunView]) -> Plot:
    """The share of scores that are no number; nothing where there never was one."""
    plot = Plot("scores that failed, percent", "NaN and infinite scores count as the worst of their generation.")
    for number, view in enumerate(views):
        shares = failed_shares(view)
        if any(share for _, share in shares):
            lines = [line for line, _ in shares]
            plot.traces.append(_trace(lines, [100 * share for _, share in shares], view.name, number))
    return plot


def failed_shares(view: RunView) -> list[tuple[Line, float]]:
    """Of each generation, the share of its scores that are no number."""
    found = []
    for line, count in zip(*view.points("invalid_scores"), strict=True):
        scores = line.get("scores")
        if not _fits(scores):  # of an older run: one score a member, or one for each of its prompts
            members, prompts = (view.run.setting(name) for name in ("population_size", "prompts_per_generation"))
            scores = members * (prompts if type(prompts) is int else 1) if type(members) is int else 0
        if scores and scores >= count:
            found.append((line, count / scores))
    return found


def _times(views: Sequence[RunView]) -> Plot:
    """Where the seconds of a generation go; of one run alone."""
    plot = Plot("seconds of a generation")
    if len(views) > 1:
        return plot
    for number, (key, text) in enumerate(
        (("evaluate_s", "evaluating"), ("update_s", "updating"), ("draw_s", "drawing noise"))
    ):
        lines, values = views[0].points(key)
        if lines:
            plot.traces.append(_trace(lines, values, text, number))
    return plot


def plots_json(found: Sequence[Plot]) -> list[Mapping[str, Any]]:
    """All plots for the page's script."""
    return [plot.to_json() for plot in found]
