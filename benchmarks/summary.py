"""Write docs/benchmarks.md from the newest result of each benchmark on each kind of hardware.

    python benchmarks/summary.py [--results benchmarks/results] [--out docs/benchmarks.md]

Nothing is measured here. The reason for a missed target is the sentence in the result file's "why".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

TITLES = {
    "population_forward": "Population forward",
    "functional": "Small networks, functional API",
    "kernels_cuda": "Fused kernels on a GPU",
    "generation": "A whole generation",
    "prefix": "Beginnings that prompts share",
    "one_member_at_a_time": "Against one member at a time",
    "memory": "Memory",
    "noise": "Noise",
    "pretrain": "Integer pretraining",
}
INTRODUCTION = """\
# Benchmarks

Machines differ and are noisy. Every figure is therefore a ratio of two things timed in turns on one machine, in one
process (for memory: in two processes). It shows the median over the turns, with the smallest and the largest.
`make bench` repeats the measurements, which needs a quiet machine. `python benchmarks/summary.py` writes this page from
`benchmarks/results/`, which also has the times behind each ratio.

The figures on language models dated 2026-11-22 were measured before the low-rank term was rewritten in C, and have not
been repeated on a quiet machine since ([the log](dev/log.md)).
"""

Result = Mapping[str, Any]


def newest(folder: Path) -> list[Result]:
    """The newest result of each benchmark, hardware and number of threads, in the order of the page."""
    chosen: dict[tuple[Any, ...], Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = (result["what"], result["hardware"], result["device"], result["threads"])
        if key not in chosen or result["date"] >= chosen[key]["date"]:
            chosen[key] = result
    order = list(TITLES)
    return sorted(chosen.values(), key=lambda r: order.index(r["what"]) if r["what"] in order else len(order))


def title(result: Result) -> str:
    return TITLES.get(result["what"], result["what"].replace("_", " ").capitalize())


def verdict(line: Mapping[str, Any]) -> str:
    """``met``, or by how much not."""
    if line["met"] is not False:
        return "met" if line["met"] else ""
    return f"**missed** by {abs(line['ratio']['median'] / line['target'] - 1):.0%}"


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headers, ["---"] * len(headers), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in rows)


def targets(results: Sequence[Result]) -> str:
    """The one table: every case that has a target."""
    lines = []
    for result in results:
        for line in result["rows"]:
            if line["target"] is not None:
                what = f"{title(result)}: {line['case']}"
                measured = [common.goal(line), common.figure(line["ratio"]), verdict(line)]
                lines.append([what, *measured, result["hardware"], result["date"], f"`{result['command']}`"])
    return table(["what", "target", "measured", "", "hardware", "date", "command"], lines)


def section(result: Result) -> str:
    """One benchmark: what its ratio is, what it ran on, why a target is missed, and the cases without a target."""
    missed = any(line["met"] is False for line in result["rows"])
    names = ("eggroll-evolve", "eggroll-es", "torch", "transformers", "numpy")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names if name in result["versions"])
    git = result["git"]
    revision = "unknown" if git is None else git["commit"][:10] + (" with local changes" if git["changed"] else "")
    text = f"## {title(result)}, {result['hardware']}\n\nRatio: {result['measure']}.\n\n"
    if missed or result["why"]:
        text += f"{result['why'] or 'A target is missed, and nobody has written down why.'}\n\n"
    others = [[line["case"], common.figure(line["ratio"])] for line in result["rows"] if line["target"] is None]
    if others:
        text += table(["cases without a target", "measured"], others) + "\n"
    return text + (
        f"{result['threads']} threads, {result['turns']} turns, load average before {result['load_average_before']}; "
        f"{versions}, Python {result['versions']['python']}; revision {revision}; `{result['command']}`, "
        f"{result['date']}.\n"
    )


def page(results: Sequence[Result]) -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, targets(results), *(section(result) for result in results)])


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--results", type=Path, default=common.RESULTS)
    made.add_argument("--out", type=Path, default=common.ROOT / "docs" / "benchmarks.md")
    args = made.parse_args()
    results = newest(args.results)
    if not results:
        sys.exit(f"{args.results} holds no results; run `make bench` first")
    args.out.write_text(page(results), encoding="utf-8")
    print(f"written to {args.out}, from {len(results)} results")
    for result in results:
        if not result["why"] and any(line["met"] is False for line in result["rows"]):
            print(f'{result["what"]} on {result["hardware"]}: a target is missed; say why in "why" of its result file')


if __name__ == "__main__":
    main()
