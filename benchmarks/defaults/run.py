"""Three small tasks, with defaults only: the held-out score before and after, three seeds.

    python benchmarks/defaults/run.py --folder /tmp/defaults --minutes 11 --seeds 0 1 2      an hour and a quarter

Each run is the command that a newcomer types, in a process of its own, one after the other:

    eggroll tune smollm2-135m -r score.py -d train.jsonl --eval-prompts heldout.jsonl --minutes 11 --seed S

Run directories stay in the folder: runs that are finished are not repeated, one that was interrupted goes on, and so a
table can be made in several sittings. The best possible score of each task is 1. ``--only`` takes some of the tasks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import RESULTS, ROOT, hardware, slug  # noqa: E402

from eggroll.run.provenance import cores, git_revision, versions  # noqa: E402

TASKS = ("json_object", "three_items", "one_question")
MODEL, BEST, TARGET = "smollm2-135m", 1.0, 1 / 3
CHOSEN = ("sigma", "lr", "lr_schedule", "generations", "population_size", "prompts_per_generation")
FINISHED, WALL = "report.html", "wall_s.json"


def command(task: str, seed: int, directory: Path, minutes: float, model: str) -> list[str]:
    """The command of one run: no setting of the algorithm is given."""
    here = HERE / task
    words = ["tune", model, "-r", here / "score.py", "-d", here / "train.jsonl"]
    words += ["--eval-prompts", here / "heldout.jsonl", "--minutes", f"{minutes:g}", "--seed", seed, "-o", directory]
    return [str(word) for word in words]


def run(task: str, seed: int, folder: Path, minutes: float, extra: Sequence[str], model: str) -> Path:
    """The directory of a finished run; one that is there already is not repeated."""
    directory = folder / f"{task}-{seed}"
    if (directory / FINISHED).exists():
        return directory
    words = command(task, seed, directory, minutes, model)
    if (directory / "config.json").exists():
        words = ["tune", model, "--resume", str(directory)]
    started = time.perf_counter()
    print(f"\n{task}, seed {seed}: eggroll {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "eggroll.cli.main", *words, *extra], check=True)
    spent = json.loads((directory / WALL).read_text()) if (directory / WALL).exists() else 0.0
    (directory / WALL).write_text(json.dumps(round(spent + time.perf_counter() - started, 1)))
    return directory


def collect(task: str, directory: Path) -> dict[str, Any]:
    """What a run directory says."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["generation"], round(line["heldout_reward"], 4)) for line in lines if "heldout_reward" in line]
    options = json.loads((directory / "config.json").read_text())["options"]
    environment = json.loads((directory / "environment.json").read_text())
    before, after = curve[0][1], curve[-1][1]
    return {
        "task": task,
        "seed": options["seed"],
        "heldout_before": before,
        "heldout_after": after,
        "part_of_distance_to_best": round((after - before) / (BEST - before), 3),
        "generations_done": lines[-1]["generation"],
        "wall_s": json.loads((directory / WALL).read_text()) if (directory / WALL).exists() else None,
        "curve": curve,
        "members": [(line["generation"], round(line["fitness_mean"], 4)) for line in lines if "fitness_mean" in line],
        "settings": {name: options[name] for name in CHOSEN},
        "chosen": environment.get("chosen", {}),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown, a row for each run."""
    head = "| task | seed | before | after | of the distance to 1 | sigma | lr | generations | members x prompts | s |"
    rows = [head, "|---|---" + "|---:" * 8 + "|"]
    for one in results:
        made = one["settings"]
        rows.append(
            f"| {one['task']} | {one['seed']} | {one['heldout_before']:.3f} | {one['heldout_after']:.3f} "
            f"| {one['part_of_distance_to_best']:.0%} | {made['sigma']:g} | {made['lr']:g} "
            f"| {one['generations_done']} | {made['population_size']} x {made['prompts_per_generation']} "
            f"| {'' if one['wall_s'] is None else format(one['wall_s'], '.0f')} |"
        )
    return "\n".join(rows) + "\n"


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each task: its seeds' parts of the distance, the smallest first, and whether all reach the target."""
    found = {}
    for task in dict.fromkeys(one["task"] for one in results):
        parts = sorted(one["part_of_distance_to_best"] for one in results if one["task"] == task)
        found[task] = {"parts": parts, "target": round(TARGET, 3), "reached": min(parts) >= TARGET}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the run directories are")
    parser.add_argument("--minutes", type=float, default=6.0, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--model", default=MODEL, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS / "defaults", help="where the table goes")
    parser.add_argument("extra", nargs="*", help="behind --: further options of eggroll tune, for trials")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        for task in options.only:
            directory = run(task, seed, options.folder, options.minutes, options.extra, options.model)
            results.append(collect(task, directory))
            print(table(results), flush=True)
    results.sort(key=lambda one: (TASKS.index(one["task"]), one["seed"]))
    today = datetime.date.today().isoformat()
    facts = {"hardware": hardware(), "date": today, "revision": git_revision(ROOT), "versions": versions()}
    threads = int(os.environ.get("OMP_NUM_THREADS", cores()))
    content = {
        "what": "defaults", **facts, "threads": threads, "model": options.model, "minutes": options.minutes,
        "extra": options.extra, "summary": summary(results), "runs": results,
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    few = "" if threads == cores() else f"-{threads}-thread{'s' if threads > 1 else ''}"
    path = options.results / f"defaults_{slug(hardware())}{few}_{today}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(results))
    print(json.dumps(summary(results), indent=1))
    print(path)


if __name__ == "__main__":
    main()
