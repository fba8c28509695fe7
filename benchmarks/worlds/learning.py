"""What SmolLM2-135M learns from conversations with a world: a task's held-out score before and after, over seeds.

    python benchmarks/worlds/learning.py --folder runs/worlds                guess_number, three seeds of half an hour
    python benchmarks/worlds/learning.py --folder runs/worlds --task maze    the same with another task
    python benchmarks/worlds/learning.py --folder runs/worlds --write        writes the finished runs as a result

Each seed is one ``eggroll tune`` in a process of its own, which is interrupted when its time is used up (what members
were scored and updated takes; measuring does not count) and leaves its model. One that was cut off is resumed, one that
is finished is kept. ``eggroll eval`` then holds the same test conversations with the model before and after.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, ROOT, hardware, slug

from eggroll.run.provenance import git_revision, versions

PROGRAM = [sys.executable, "-m", "eggroll.cli.main"]
LOOK_S = 5.0


def directory_of(folder: Path, task: str, seed: int) -> Path:
    """The run directory of a task and a seed."""
    return folder / f"{slug(task)}-{seed}"


def command_of(run: Path, task: str, seed: int, extra: list[str]) -> list[str]:
    """What makes a run, or goes on with it."""
    if (run / "config.json").exists():
        return [*PROGRAM, "tune", "--resume", str(run)]
    settings = ["--seed", str(seed), "--dtype", "float32", "--report-to", "none", "--output", str(run)]
    return [
        *PROGRAM,
        "tune",
        "smollm2-135m",
        "--task",
        task,
        "-g",
        "10000",
        "--checkpoint-every",
        "10",
        *settings,
        *extra,
    ]


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def spent(run: Path) -> float:
    """Seconds that a run has trained for."""
    return sum(line.get("evaluate_s", 0.0) + line.get("update_s", 0.0) for line in lines_of(run))


def finished(run: Path, minutes: float) -> bool:
    """Whether a run has used its time and saved its model."""
    return (run / "model" / "eggroll.json").exists() and spent(run) >= 60 * minutes


def train(run: Path, task: str, seed: int, minutes: float, extra: list[str]) -> None:
    """Train until the time is used up; the run saves its model then."""
    process = subprocess.Popen(command_of(run, task, seed, extra))
    try:
        while process.poll() is None and spent(run) < 60 * minutes:
            time.sleep(LOOK_S)
        if process.poll() is None:
            process.terminate()  # a shell lets its background jobs ignore SIGINT
        process.wait()
    finally:
        process.kill()


def compare(run: Path, task: str, samples: int) -> dict[str, Any]:
    """What ``eggroll eval`` says of the test conversations before and after."""
    file = run / "eval.json"
    if not file.exists():
        models = ["smollm2-135m", str(run / "model")]
        options = ["--task", task, "--problems", str(samples), "--dtype", "float32", "--output", str(file)]
        subprocess.run([*PROGRAM, "eval", *models, *options], check=True)
    found = json.loads(file.read_text())
    tuned = {"model": f"{run.name}/model"}  # not where it lies on this machine
    models = [found["models"][0], {**found["models"][1], **tuned}]
    return {"models": models, "difference": found["difference"], "samples": found["samples"]}


def collect(run: Path) -> dict[str, Any]:
    """What a run directory says."""
    lines = lines_of(run)
    curve = [(line["generation"], line["heldout_reward"]) for line in lines if "heldout_reward" in line]
    return {
        "before": curve[0][1],
        "after": curve[-1][1],
        "gain": curve[-1][1] - curve[0][1],
        "generations": lines[-1]["generation"],
        "minutes": round(spent(run) / 60, 2),
        "failed_fraction": max(line.get("worlds/failed_fraction", 0.0) for line in lines),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are, and go on from")
    parser.add_argument("--task", default="guess_number", help="a task with a world")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--minutes", type=float, default=28.0, help="training of each seed")
    parser.add_argument("--samples", type=int, default=128, help="test conversations, before and after")
    parser.add_argument("--write", action="store_true", help="write the result file")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of every run")
    options = parser.parse_args()
    runs: dict[int, dict[str, Any]] = {}
    for seed in options.seeds:
        run = directory_of(options.folder, options.task, seed)
        if not finished(run, options.minutes):
            train(run, options.task, seed, options.minutes, options.options)
        if finished(run, options.minutes):
            runs[seed] = {**collect(run), "test": compare(run, options.task, options.samples)}
            change = runs[seed]["test"]["difference"]["mean"]
            print(
                f"seed {seed}: held-out {runs[seed]['before']:.3f} -> {runs[seed]['after']:.3f} after "
                f"{runs[seed]['generations']} generations, {runs[seed]['minutes']:.0f} minutes; test conversations "
                f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]",
                flush=True,
            )
    if not runs:
        return
    gains = [run["gain"] for run in runs.values()]
    print(f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds rose, by {statistics.mean(gains):+.3f} on average")
    if options.write:
        today = datetime.date.today().isoformat()
        path = RESULTS / "worlds" / f"{slug(options.task)}_{slug(hardware())}_{today}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"hardware": hardware(), "date": today, "revision": git_revision(ROOT), "versions": versions()}
        whole = {"what": f"conversations: {options.task}", "options": options.options, **facts, "runs": runs}
        path.write_text(json.dumps(whole, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()
