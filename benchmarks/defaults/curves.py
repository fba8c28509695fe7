"""Draw what the defaults learn, and what a sigma twice as large does, from result files.

    python benchmarks/defaults/curves.py RESULT.json SIGMA.json [--output docs/images/choosing.png]

``RESULT.json`` is what ``run.py`` writes: three tasks, three seeds. ``SIGMA.json`` has runs of one seed at two sigmas
(``run.py --seeds 0 -- --sigma 0.018``, and the same without it), put together by:

    python benchmarks/defaults/curves.py --join SIGMA.json runs/a/json_object-0 runs/b/json_object-0 ...
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from common import ROOT, hardware  # noqa: E402
from run import TASKS, collect  # noqa: E402

OUTPUT = ROOT / "docs" / "images" / "choosing.png"


def join(runs: list[Path]) -> dict[str, Any]:
    """What the directories of single runs say; their names begin with the task."""
    found = [collect(run.name.rpartition("-")[0], run) for run in runs]
    return {"what": "sigmas", "hardware": hardware(), "runs": found}


def draw(result: dict[str, Any], sigmas: dict[str, Any], output: Path) -> None:
    """Two rows of panels: the defaults by task, a line for each seed; and one seed at two sigmas."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(10, 5.6), sharey=True, layout="constrained")
    for panel, task in zip(panels[0], TASKS, strict=True):
        for run in (run for run in result["runs"] if run["task"] == task):
            (line,) = panel.plot(*zip(*run["members"], strict=True), lw=1.2, label=f"seed {run['seed']}")
            panel.plot(*zip(*run["curve"], strict=True), "o", ms=5, color=line.get_color())
        panel.set_title(f"{task}, defaults", fontsize=10)
    for panel, task in zip(panels[1], TASKS, strict=True):
        for run in (run for run in sigmas["runs"] if run["task"] == task):
            sigma = run["settings"]["sigma"]
            (line,) = panel.plot(*zip(*run["members"], strict=True), lw=1.2, label=f"sigma {sigma:g}")
            panel.plot(*zip(*run["curve"], strict=True), "o", ms=5, color=line.get_color())
        panel.set_xlabel("generation")
        if panel.lines:
            panel.set_title(f"{task}, one seed", fontsize=10)
        else:
            panel.set_axis_off()
    for panel in panels.flat:
        panel.set_ylim(0, 1.02)
        if panel.lines:
            place = "lower right" if panel in panels[0] else "upper left"
            panel.legend(fontsize=8, loc=place, frameon=False)
    for panel in panels[:, 0]:
        panel.set_ylabel("score: members (line),\nheld-out prompts (dots)", fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="two result files; with --join, directories of runs")
    parser.add_argument("--join", type=Path, help="write what the runs say to this file")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    if given.join is not None:
        given.join.write_text(json.dumps(join(given.files), indent=1) + "\n")
        print(given.join)
        return
    if len(given.files) != 2:
        parser.error(f"two result files are needed, not {len(given.files)}")
    draw(*(json.loads(file.read_text()) for file in given.files), given.output)
    print(given.output)


if __name__ == "__main__":
    main()
