"""What integer pretraining learns: over seeds, population sizes, options and model shapes, as in results/pretrain.

    python benchmarks/pretrain/learning.py --data tinyshakespeare.txt --study seeds --minutes 30
    python benchmarks/pretrain/learning.py --data tinyshakespeare.txt --study population --minutes 5 --million-tokens 40

Each run is one ``eggroll pretrain`` in a process of its own, one after the other; what is reported is the bits per byte
of all held-out text (the last tenth, which no update sees) after the last generation, and the curve on a part of it.
A run of a given time has as many generations as fit at the speed of its first ones, because the schedule of ``alpha``
ends with the last generation; it is not cut off. ``population`` has the same runs twice: with the same number of
member-tokens, and with the same time; ``options`` and ``momentum`` have the same number of member-tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

BASE: dict[str, Any] = {
    "n_layers": 1, "hidden": 64, "pop_size": 4096, "tokens": 16, "context": 16, "fitness": "normalized",
    "alpha_schedule": "exponential", "alpha": 1.0, "alpha_final": 0.02,
}  # fmt: skip
MOMENTUM = {"momentum_shift": 2}
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "seeds": {f"seed {seed}": {"seed": seed} for seed in (0, 1, 2)},
    "population": {f"{size}": {"pop_size": size} for size in (64, 512, 4096, 32768)},
    "options": {
        "normalized": {},
        "sign": {"fitness": "sign"},
        "momentum": MOMENTUM,
        "momentum, alpha 0.3 to 0.01": {**MOMENTUM, "alpha": 0.3, "alpha_final": 0.01},
        "sign, momentum": {"fitness": "sign", **MOMENTUM},
        "sign, momentum, alpha 0.3 to 0.01": {"fitness": "sign", **MOMENTUM, "alpha": 0.3, "alpha_final": 0.01},
        "sign, paper's schedule": {"fitness": "sign", "alpha_schedule": "hyperbolic"},
    },
    "momentum": {
        f"{name}, seed {seed}": {**changes, "seed": seed}
        for seed in (0, 1, 2)
        for name, changes in (("momentum", MOMENTUM), ("without", {}))
    },
    "shapes": {
        "1 x 64": {},
        "2 x 64": {"n_layers": 2},
        "1 x 256": {"hidden": 256},
        "1 x 256, sigma 2^-5": {"hidden": 256, "sigma_shift": 5},
        "1 x 64, windows of 32": {"tokens": 32, "context": 32, "pop_size": 2048},
    },
}
CALIBRATION = 12
"""Generations whose speed says how many fit; a fifth as many are left out at the start."""


def pretrain(data: Path, settings: dict[str, Any], generations: int, out: Path, threads: int | None) -> dict[str, Any]:
    """One run; what is in its ``result.json``, with the curve."""
    command = [sys.executable, "-m", "eggroll.cli.main", "pretrain", "--data", str(data), "-o", str(out)]
    command += ["-g", str(generations), "--eval-every", str(max(1, generations // 40)), "--report-to", "none"]
    command += ["--sample-every", "0", "--checkpoint-every", str(max(generations, 1))]
    command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    if threads:
        command += ["--threads", str(threads)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr or done.stdout}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    per_generation = settings["pop_size"] * settings["tokens"]
    curve = [
        [line["generation"] * per_generation, round(line.get("elapsed_s", 0.0), 1),
         round(line["validation_bits_per_byte"], 4)]
        for line in lines if "validation_bits_per_byte" in line
    ]  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    return {**result, "wall_s": round(time.perf_counter() - began, 1), "curve": curve}


def generations_in(minutes: float, data: Path, settings: dict[str, Any], threads: int | None) -> int:
    """How many generations of these settings fit into so many minutes, by the speed of a few."""
    count = CALIBRATION * max(1, 4096 // settings["pop_size"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        pretrain(data, settings, count, out, threads)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [line["evaluate_s"] + line["update_s"] for line in lines if "evaluate_s" in line][count // 5 :]
    return max(1, round(60 * minutes * len(times) / sum(times)))


def plans(args: argparse.Namespace) -> list[tuple[str, dict[str, Any], float | None]]:
    """Names, settings and minutes of the runs of a study; without minutes a run has a number of tokens."""
    made: list[tuple[str, dict[str, Any], float | None]] = []
    for name, changes in STUDIES[args.study].items():
        if args.only and args.only not in name:
            continue
        settings = {**BASE, **json.loads(args.settings), **changes}
        if args.study == "population":
            made.append((f"{name}, equal tokens", settings, None))
            made.append((f"{name}, equal time", settings, args.minutes))
        else:
            made.append((name, settings, None if args.study in ("options", "momentum") else args.minutes))
    return made


def figure(runs: dict[str, Any], path: Path) -> None:
    """Curves over member-tokens and over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    drawn, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name, run in runs.items():
        points = [point for point in run["curve"] if point[0] > 0]
        for axis, column, skip in ((axes[0], 0, "time"), (axes[1], 1, "tokens")):
            if not name.endswith(skip):
                axis.plot([p[column] for p in points], [p[2] for p in points], label=name.split(", equal")[0])
    first = next(iter(runs.values()))
    for axis, label in zip(axes, ("member-tokens", "seconds"), strict=True):
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel(label)
        axis.axhline(first["unigram_bits_per_byte"], color="gray", ls=":", lw=1, label="unigram baseline")
        axis.axhline(first["order_1_bits_per_byte"], color="gray", ls="--", lw=1, label="bigram baseline")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("bits per held-out byte")
    axes[0].set_ylim(3.4, 6.0)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)


def table(runs: dict[str, Any]) -> str:
    """The runs as Markdown."""
    lines = ["| run | bits/byte | member-tokens | generations | seconds | tokens/s |", "|---|---|---|---|---|---|"]
    for name, run in runs.items():
        lines.append(
            f"| {name} | {run['validation_bits_per_byte']:.3f} | {run['member_tokens'] / 1e6:.0f} M "
            f"| {run['generations']:,} | {run['evaluate_s'] + run['update_s']:.0f} | {run['tokens_per_s']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--study", choices=sorted(STUDIES), required=True)
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--million-tokens", type=float, default=20.0, help="of runs with equal tokens")
    parser.add_argument("--settings", default="{}", help="changes of the common settings, as JSON")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--why", default="", help="a sentence for the result file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pretrain")
    args = parser.parse_args()
    from common import hardware, slug

    from eggroll.run.provenance import git_revision, versions

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.study}_{slug(hardware())}_{datetime.date.today()}.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for name, settings, minutes in plans(args):
        if minutes is None:
            generations = max(1, round(args.million_tokens * 1e6 / (settings["pop_size"] * settings["tokens"])))
        else:
            generations = generations_in(minutes, args.data, settings, args.threads)
        with tempfile.TemporaryDirectory() as folder:
            made = pretrain(args.data, settings, generations, Path(folder) / "run", args.threads)
        runs[name] = {**made, "settings": {**settings, "generations": generations}, "minutes": minutes}
        print(name, round(made["validation_bits_per_byte"], 4), made["wall_s"], flush=True)
        head = {
            "what": f"pretrain_{args.study}", "data": args.data.name, "hardware": hardware(), "threads": args.threads,
            "load": [round(x, 1) for x in os.getloadavg()], "why": args.why, "revision": git_revision(ROOT),
            "versions": versions(), "date": str(datetime.date.today()),
        }  # fmt: skip
        path.write_text(json.dumps({**head, "runs": runs}, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(runs))
        figure(runs, path.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    main()
