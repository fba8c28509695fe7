"""The learning curve of a run as a PNG: the center's held-out return and the members' returns, over steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from eggroll._optional import require


def write_curve(metrics: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """The PNG's bytes.

    Args:
        metrics: lines of ``metrics.jsonl``.
        title: of the drawing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", extra="rl")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    members = [line for line in metrics if line.get("fitness_mean") is not None]
    steps = [line["env_steps"] for line in members]
    axes.plot(steps, [line["fitness_mean"] for line in members], color="#9db8d9", label="members, mean")
    axes.plot(steps, [line["fitness_max"] for line in members], color="#d7dfe9", label="members, best")
    at = {line["generation"]: line["env_steps"] for line in members} | {0: 0.0}
    center = [
        (at[line["generation"]], line["heldout_reward"])
        for line in metrics
        if line.get("heldout_reward") is not None and line["generation"] in at
    ]
    if center:
        axes.plot(
            *zip(*center, strict=True), color="#c8692b", marker="o", markersize=3, label="center, held-out episodes"
        )
    axes.set(title=title, xlabel="environment steps", ylabel="return")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
