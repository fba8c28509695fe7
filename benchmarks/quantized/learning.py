"""What quantized formats and their update rules learn: ``one_sentence`` on SmolLM2 beside bfloat16, over several seeds.

    python benchmarks/quantized/learning.py --folder runs/quantized              all runs: some hours on two cores
    python benchmarks/quantized/learning.py --folder runs/quantized --minutes 60  some of them; call it again to go on
    python benchmarks/quantized/learning.py --folder runs/quantized --only int8 bfloat16 --write

Each run is one ``eggroll tune`` in a process of its own; one that was cut off is resumed, one that is finished is
kept. All have the task's own settings, which were chosen for bfloat16 on its validation questions (two variants: with
twice the learning rate, 0.1), and the same number of generations. With ``--write`` the finished runs become the
committed table and its picture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, ROOT, hardware, slug

from eggroll.run.provenance import git_revision, versions

TASK = "one_sentence"
BASE = "bfloat16"


@dataclass(frozen=True)
class Variant:
    """A format with a rule.

    Attributes:
        name: in tables.
        arguments: of ``eggroll tune``, beside those that all have.
        target: the part of bfloat16's gain that it should reach; ``None`` for one that is there for comparison.
    """

    name: str
    arguments: tuple[str, ...]
    target: float | None = None


def _quantized(form: str, rule: str = "error_feedback") -> tuple[str, ...]:
    return "--quantize", form, "--quantized-update", rule


VARIANTS = (
    Variant(BASE, ()),
    Variant("int8", _quantized("int8"), 0.90),
    Variant("GGUF Q4_1", _quantized("gguf"), 0.75),
    Variant("int8, residual from 0", (*_quantized("int8"), "--residual-start", "zero")),
    Variant("GGUF Q4_1, residual from 0", (*_quantized("gguf"), "--residual-start", "zero")),
    Variant("GGUF Q4_1, twice the lr", (*_quantized("gguf"), "--lr", "0.1"), 0.75),
    Variant("int4", _quantized("int4"), 0.75),
    Variant("int4, twice the lr", (*_quantized("int4"), "--lr", "0.1"), 0.75),
    Variant("int8, threshold", _quantized("int8", "threshold")),
    Variant("int8, nearest", _quantized("int8", "nearest")),
    Variant("GGUF Q4_1, threshold", _quantized("gguf", "threshold")),
    Variant("GGUF Q4_1, nearest", _quantized("gguf", "nearest")),
    Variant("GGUF Q4_1, scales", _quantized("gguf", "scales")),
)


def directory_of(folder: Path, variant: Variant, seed: int) -> Path:
    """The run directory of a variant and seed."""
    return folder / f"{slug(variant.name)}-{seed}"


def command_of(run: Path, variant: Variant, seed: int, extra: list[str]) -> list[str]:
    """What makes a run, or goes on with it."""
    program = [sys.executable, "-m", "eggroll.cli.main", "tune"]
    if (run / "config.json").exists():
        return [*program, "--resume", str(run)]
    settings = ["--seed", str(seed), "--dtype", "bfloat16", "--report-to", "none", "--output", str(run)]
    return [*program, "smollm2-135m", "--task", TASK, *variant.arguments, *settings, *extra]


def finished(run: Path) -> bool:
    """Whether a run has come to its end and saved its model."""
    return (run / "model" / "eggroll.json").exists()


def collect(run: Path) -> dict[str, Any]:
    """What a run directory says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["generation"], line["heldout_reward"]) for line in lines if "heldout_reward" in line]
    seconds = [line["evaluate_s"] + line.get("update_s", 0.0) for line in lines if "evaluate_s" in line]
    return {
        "before": curve[0][1],
        "after": curve[-1][1],
        "best": max(value for _, value in curve),
        "gain": curve[-1][1] - curve[0][1],
        "generations": curve[-1][0],
        "median_generation_s": round(statistics.median(seconds), 2),
        "curve": curve,
    }


def summary(results: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each variant that has runs: gains over its seeds, and the part of bfloat16's over the same seeds."""
    rows, targets = [], {variant.name: variant.target for variant in VARIANTS}
    for name, runs in results.items():
        gains = [run["gain"] for run in runs.values()]
        base = [results[BASE][seed]["gain"] for seed in runs if seed in results.get(BASE, {})]
        part = statistics.mean(gains) / statistics.mean(base) if len(base) == len(gains) else None
        rows.append(
            {
                "variant": name, "seeds": sorted(runs), "before": statistics.mean(r["before"] for r in runs.values()),
                "after": [run["after"] for run in runs.values()], "gain": statistics.mean(gains),
                "part_of_bfloat16": part, "target": targets[name],
                "median_generation_s": statistics.median(run["median_generation_s"] for run in runs.values()),
            }
        )  # fmt: skip
    return rows


def draw(results: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Held-out reward over generations, a line for each variant: the mean, and its seeds as thin lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for index, (name, runs) in enumerate(results.items()):
        color = f"C{index}"
        curves = [dict(run["curve"]) for run in runs.values()]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), color=color, linewidth=0.5, alpha=0.5)
        means = [statistics.mean(curve[generation] for curve in curves) for generation in shared]
        axes.plot(shared, means, color=color, linewidth=2, label=f"{name} ({len(runs)} seeds)")
    axes.set_xlabel("generation")
    axes.set_ylabel("reward on held-out questions")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are, and go on from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=[variant.name for variant in VARIANTS])
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="do not start another run after this many minutes"
    )
    parser.add_argument("--write", action="store_true", help="write the result file and the picture")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of every run")
    options = parser.parse_args()
    chosen = [variant for variant in VARIANTS if options.only is None or variant.name in options.only]
    end = time.monotonic() + 60 * options.minutes
    for seed in options.seeds:  # all variants of a seed, then the next: what is there after a while can be compared
        for variant in chosen:
            run = directory_of(options.folder, variant, seed)
            if not finished(run) and time.monotonic() < end:
                subprocess.run(command_of(run, variant, seed, options.options), check=True)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in chosen:
        runs = {seed: directory_of(options.folder, variant, seed) for seed in options.seeds}
        done = {seed: collect(run) for seed, run in runs.items() if finished(run)}
        if done:
            results[variant.name] = done
    rows = summary(results)
    for row in rows:
        part = "-" if row["part_of_bfloat16"] is None else f"{row['part_of_bfloat16']:.2f}"
        print(f"{row['variant']:24} seeds {len(row['seeds'])}  gain {row['gain']:+.4f}  of bfloat16's {part}")
    if options.write:
        today = datetime.date.today().isoformat()
        stem = RESULTS / "quantized" / f"learning_{slug(hardware())}_{today}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        facts = {"hardware": hardware(), "date": today, "revision": git_revision(ROOT), "versions": versions()}
        whole = {"what": "quantized learning", **facts, "summary": rows, "runs": results}
        stem.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")
        draw(results, stem.with_suffix(".png"))
        print(stem.with_suffix(".json"))


if __name__ == "__main__":
    main()
