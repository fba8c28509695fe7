"""What all benchmarks share: timing side by side, what ran where, one form of result file, tables.

A figure is a ratio of two things timed in one process, in turns, so that both see the same disturbances: the median
over the turns of the ratio within each turn, with the smallest and the largest. Absolute times are kept beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eggroll.run.provenance import cores, cpu_model, git_revision, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "smollm2-135m"
MIN_TURNS = 5
BUSY = 0.5
"""Load average (of the last minute) from which on a machine is not quiet."""

Times = dict[str, list[float]]


def parser(description: str | None, *, turns: int = 7, model: bool = True) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have; ``model=False`` leaves out those that choose a language model."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0] if description else None)
    made.add_argument("--quick", action="store_true", help="smallest sizes, two turns, no result file: does it run?")
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    made.add_argument("--threads", type=int, help="threads of a CPU; all cores by default (OMP_NUM_THREADS)")
    made.add_argument("--turns", type=int, default=turns, help=f"measurements of each variant (default {turns})")
    made.add_argument("--why", default="", help="a sentence for the result file: why a target is missed")
    made.add_argument("--results", type=Path, default=RESULTS, help="directory of the result files")
    if model:
        made.add_argument("--model", default=MODEL, help="alias, directory or hub id")
        made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="float32 bfloat16")
        made.add_argument("--members", type=int, help="members of the population")
    return made


def begin(made: argparse.ArgumentParser, *, members: int = 32) -> argparse.Namespace:
    """Parse, set threads, fill in defaults, and say what runs where; exits with a sentence where that cannot be."""
    args = made.parse_args()
    place = torch.device(args.device)
    if place.type == "cuda" and not torch.cuda.is_available():
        made.exit(2, f"--device {args.device}: torch {torch.__version__} sees no CUDA device here; use --device cpu\n")
    if args.quick:
        args.turns = 2
    elif args.turns < MIN_TURNS:
        made.error(f"--turns (={args.turns}) must be at least {MIN_TURNS} for a figure; use --quick for a smoke test")
    if args.threads:
        torch.set_num_threads(args.threads)
    if "members" in args and args.members is None:
        args.members = 4 if args.quick else members
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    args.load_before = round(load, 2)
    print(f"{hardware(args.device)}, threads: {torch.get_num_threads()}, torch {torch.__version__}")
    if load > BUSY:
        print(f"note: the load average is {load:.1f}, so this machine is not quiet")
    return args


def hardware(device: str = "cpu") -> str:
    """GPU name, or short CPU model and cores: ``AMD EPYC 9354, 2 cores``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{short_cpu(cpu_model())}, {cores()} core{'s' if cores() > 1 else ''}"


def capability() -> str:
    """The widest instructions that a CPU has for products: ``AVX2``, ``AVX512``, ``AMX``."""
    return "AMX" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability()


def short_cpu(name: str) -> str:
    """A CPU's name without what says nothing: ``Intel(R) Xeon(R) CPU @ 2.20GHz`` is ``Intel Xeon``."""
    name = re.sub(r"\((R|TM)\)|@.*|\b\d+-Core\b|\b(CPU|Processor)\b", " ", name, flags=re.IGNORECASE)
    return " ".join(name.split()) or "CPU"


def slug(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def seconds(function: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Wall time of one call; a GPU is waited for before and after."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(variants: Mapping[str, Callable[[], float]], *, turns: int, warm_up: int = 1) -> Times:
    """Let each variant measure itself once per turn: name to one number (mostly seconds) for each turn.

    Every other turn runs backwards, so that a machine that slowly changes its speed favours nobody.
    """
    for _ in range(warm_up):
        for variant in variants.values():
            variant()
    measured: Times = {name: [] for name in variants}
    for turn in range(turns):
        names = list(variants)
        for name in reversed(names) if turn % 2 else names:
            measured[name].append(variants[name]())
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(measured: Mapping[str, Sequence[float]], over: str, under: str) -> dict[str, float]:
    """``over / under`` within each turn: median, smallest and largest."""
    return spread([a / b for a, b in zip(measured[over], measured[under], strict=True)])


def row(
    case: str, figure: Mapping[str, float], *, target: float | None = None, lower_is_better: bool = False, **more: Any
) -> dict[str, Any]:
    """One line of a result: the case, its ratio, the target if it has one and whether that is met."""
    met = None
    if target is not None:
        met = figure["median"] <= target if lower_is_better else figure["median"] >= target
    return {
        "case": case,
        "ratio": dict(figure),
        "target": target,
        "lower_is_better": lower_is_better,
        "met": met,
        **more,
    }


def milliseconds(values: Sequence[float]) -> str:
    """The median of some times, for a table."""
    taken = statistics.median(values) * 1e3
    return f"{taken:,.1f} ms" if taken >= 10 else f"{taken:.3f} ms"


def figure(found: Mapping[str, float]) -> str:
    """``0.953 (0.941 to 0.960)``; with fewer decimals from 10 on."""
    digits = 1 if found["median"] >= 10 else 3
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def goal(line: Mapping[str, Any]) -> str:
    """``≥ 0.95``, or a dash for a case without a target."""
    if line["target"] is None:
        return "–"
    return f"{'≤' if line['lower_is_better'] else '≥'} {line['target']:g}"


def print_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first one to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [headers, *lines]) for i in range(len(headers))]
    for line in [headers, *lines]:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows made by :func:`row`, with the time of each variant where they hold times."""
    names = list(dict.fromkeys(name for line in rows for name in line.get("seconds", {})))
    lines = []
    for line in rows:
        times = [milliseconds(line["seconds"][name]) if name in line.get("seconds", {}) else "" for name in names]
        verdict = {True: "met", False: "MISSED", None: ""}[line["met"]]
        lines.append([line["case"], *times, figure(line["ratio"]), goal(line), verdict])
    print_table(["case", *names, "ratio (min to max)", "target", ""], lines)


def say(line: Mapping[str, Any]) -> None:
    """A row as soon as it is measured; the table comes at the end."""
    print(f"{line['case']}: {figure(line['ratio'])}", flush=True)


def finish(
    what: str, measure: str, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, **more: Any
) -> Path | None:
    """Print the rows and write ``<what>_<hardware>_<date>.json``; nothing is written after ``--quick``.

    Args:
        what: the benchmark's name in file names.
        measure: what the ratio is, in words.
        rows: made by :func:`row`.
        args: from :func:`begin`.
        **more: further facts.
    """
    print_rows(rows)
    if args.quick:
        print("--quick: these are no measurements, and no result file was written")
        return None
    date = datetime.date.today().isoformat()
    threads = torch.get_num_threads()
    name = slug(hardware(args.device))
    if torch.device(args.device).type == "cpu" and threads != cores():
        name += f"-{threads}-thread{'s' if threads > 1 else ''}"
    result = {
        "what": what,
        "measure": measure,
        "hardware": hardware(args.device),
        "device": args.device,
        "cpu": {"model": cpu_model(), "cores": cores(), "capability": capability()},
        "threads": threads,
        "load_average_before": args.load_before,
        "date": date,
        "command": command(),
        "git": git_revision(ROOT),
        "versions": {"python": platform.python_version(), **versions()},
        "turns": args.turns,
        "why": args.why,
        **more,
        "rows": list(rows),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{what}_{name}_{date}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    if not args.why and any(line["met"] is False for line in rows):
        print(f'a target is missed: say why in a sentence, in "why" of {path.name} (or with --why)')
    return path


def command() -> str:
    """The command line, as it is typed at the root of a checkout, without what does not bear on the figures."""
    aside = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    aside.add_argument("--why")
    aside.add_argument("--results")
    _, arguments = aside.parse_known_args(sys.argv[1:])
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
