"""Write docs/benchmarks.md and one page per machine from the newest results, and say what moved.

    python benchmarks/summary.py [--results benchmarks/results] [--out docs/benchmarks.md]
    python benchmarks/summary.py --moved     what differs from the results before by more than both spreads

Nothing is measured here. Page of a machine: ``<results>/<machine>.md``. The reason for a missed target is the sentence
in the result file's "why".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import common

TITLES = {
    "population_forward": "Population forward",
    "functional": "Small networks, functional API",
    "kernels_cuda": "Fused kernels on a GPU",
    "generation": "A whole generation",
    "update": "An update",
    "decoding": "Written text, against transformers' attention and cache",
    "prefix": "Beginnings that prompts share",
    "one_member_at_a_time": "Against one member at a time",
    "memory": "Memory",
    "noise": "Noise",
    "pretrain": "Integer pretraining",
    "rwkv7": "RWKV-7",
    "waiting": "Waiting threads",
    "blocks": "Blocks of rows",
    "quantized": "Quantized weights",
    "growth": "Growth",
    "jax": "JAX",
}
INTRODUCTION = """\
# Benchmarks

Machines differ and are noisy. Every figure is therefore a ratio of two things timed in turns on one machine, in one
process (for memory: in two processes). It shows the median over the turns, with the smallest and the largest.
`make bench` repeats the measurements, which needs a quiet machine, and writes this page from `benchmarks/results/`,
which also has the times behind each ratio.

A target that is met on one machine may be missed on another: where the base product is fast (matrix units, as AMX and
GPUs have), the low-rank term has less to hide behind. No committed result comes from a processor with AMX or from a
GPU. The figures on language models dated 2026-11-22 were measured before the low-rank term was rewritten in C; those of
memory, before a population's first call compared members with plain copies of their weights, which takes up to 0.9 GB
more for a moment with SmolLM2-135M, so that the target of memory no longer holds there ([the log](dev/log.md)).
"""

Result = Mapping[str, Any]


def by_case(folder: Path) -> dict[tuple[Any, ...], list[Result]]:
    """All results of each benchmark, machine and number of threads, oldest first."""
    found: dict[tuple[Any, ...], list[Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = (result["what"], machine(result), result["device"])
        found.setdefault(key, []).append(result)
    return {key: sorted(results, key=lambda result: result["date"]) for key, results in found.items()}


def newest(folder: Path) -> list[Result]:
    """The newest result of each benchmark and machine, in the order of the page."""
    chosen = [results[-1] for results in by_case(folder).values()]
    order = list(TITLES)
    return sorted(chosen, key=lambda r: order.index(r["what"]) if r["what"] in order else len(order))


def machine(result: Result) -> str:
    """What ran it, as one name: ``AMD EPYC, 2 cores, AVX512``, with the threads if they are not the cores."""
    if result["device"].startswith("cuda"):
        return str(result["hardware"])
    name = f"{result['hardware']}, {result['cpu']['capability']}"
    threads = result["threads"]
    return name if threads == result["cpu"]["cores"] else f"{name}, {threads} thread{'s' if threads > 1 else ''}"


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
    """The one table: every case that has a target, a column for each machine."""
    machines = sorted({machine(result) for result in results})
    lines: dict[str, dict[str, str]] = {}
    for result in results:
        for line in result["rows"]:
            if line["target"] is not None:
                cells = lines.setdefault(f"{title(result)}: {line['case']}", {"target": common.goal(line)})
                cells[machine(result)] = " ".join(filter(None, (common.figure(line["ratio"]), verdict(line))))
    body = [[what, cells["target"], *(cells.get(one, "") for one in machines)] for what, cells in lines.items()]
    return table(["what", "target", *machines], body)


def counts(results: Sequence[Result]) -> str:
    """On which machine how many targets are met."""
    lines = []
    for name in sorted({machine(result) for result in results}):
        rows = [line for result in results if machine(result) == name for line in result["rows"]]
        judged = [line["met"] for line in rows if line["met"] is not None]
        page = f"`benchmarks/results/{common.slug(name)}.md`"
        lines.append([name, f"{sum(judged)} of {len(judged)}", page])
    return table(["machine", "targets met", "all its figures"], lines)


def moved(results: Sequence[Result]) -> list[str]:
    """What the last result of a benchmark on a machine has that lies beyond the whole spread of the one before."""
    lines = []
    for before, after in pairwise(results[-2:]):
        old = {line["case"]: line for line in before["rows"]}
        for line in after["rows"]:
            if line["case"] not in old:
                continue
            then, now = old[line["case"]]["ratio"], line["ratio"]
            if now["min"] > then["max"] or now["max"] < then["min"]:
                better = (now["median"] > then["median"]) != line["lower_is_better"]
                lines.append(
                    f"{'better' if better else 'WORSE '}  {title(after)}: {line['case']}: "
                    f"{common.figure(then)} on {before['date']}, {common.figure(now)} on {after['date']}"
                )
    return lines


def section(result: Result) -> str:
    """One benchmark: what its ratio is, what it ran on, and why a target is missed."""
    missed = any(line["met"] is False for line in result["rows"])
    names = ("eggroll-evolve", "eggroll-es", "torch", "transformers", "numpy")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names if name in result["versions"])
    git = result["git"]
    revision = "unknown" if git is None else git["commit"][:10] + (" with local changes" if git["changed"] else "")
    text = f"## {title(result)}\n\nRatio: {result['measure']}.\n\n"
    if missed or result["why"]:
        text += f"{result['why'] or 'A target is missed, and nobody has written down why.'}\n\n"
    return text + (
        f"{result['threads']} threads, {result['turns']} turns, load average before {result['load_average_before']}; "
        f"{versions}, Python {result['versions']['python']}; revision {revision}; `{result['command']}`, "
        f"{result['date']}.\n"
    )


def page(results: Sequence[Result]) -> str:
    """The page of all machines side by side."""
    reasons = [
        f"- {title(result)}, {machine(result)}: "
        f"{result['why'] or 'a target is missed, and nobody has written down why.'}"
        for result in results
        if any(line["met"] is False for line in result["rows"])
    ]
    missed = ["## Why targets are missed\n\n" + "\n".join(reasons) + "\n"] if reasons else []
    return "\n".join([INTRODUCTION, counts(results), targets(results), *missed])


def page_of(name: str, results: Sequence[Result]) -> str:
    """The page of one machine."""
    own = [result for result in results if machine(result) == name]
    lines = [
        [f"{title(r)}: {line['case']}", common.goal(line), common.figure(line["ratio"]), verdict(line), r["date"]]
        for r in own
        for line in r["rows"]
    ]
    head = f"# {name}\n\nWritten by `python benchmarks/summary.py` from the result files beside it.\n"
    return "\n".join(
        [head, table(["what", "target", "ratio", "", "date"], lines), *(section(result) for result in own)]
    )


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--results", type=Path, default=common.RESULTS)
    made.add_argument("--out", type=Path, default=common.ROOT / "docs" / "benchmarks.md")
    made.add_argument("--moved", action="store_true", help="only say what differs from the results before")
    args = made.parse_args()
    results = newest(args.results)
    if not results:
        sys.exit(f"{args.results} holds no results; run `make bench` first")
    if args.moved:
        lines = [line for series in by_case(args.results).values() for line in moved(series)]
        print("\n".join(lines) or "nothing moved by more than its spread")
        return
    args.out.write_text(page(results), encoding="utf-8")
    for name in sorted({machine(result) for result in results}):
        (args.results / f"{common.slug(name)}.md").write_text(page_of(name, results), encoding="utf-8")
    print(f"written to {args.out}, from {len(results)} results")
    for result in results:
        if not result["why"] and any(line["met"] is False for line in result["rows"]):
            print(f'{result["what"]} on {result["hardware"]}: a target is missed; say why in "why" of its result file')


if __name__ == "__main__":
    main()
