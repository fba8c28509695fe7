"""EGGROLL and GRPO (TRL's) on a task: the same model, prompts, rewards and time, settings searched equally.

    python benchmarks/grpo/compare.py --task one_sentence --threads 1 --search-minutes 3 --minutes 8 --seeds 0 1 2
    python benchmarks/grpo/compare.py --task countdown --shots 2 --threads 1 --search-minutes 6 --minutes 40
    python benchmarks/grpo/compare.py --task countdown --shots 2 --more --seeds 1 2 --minutes 12 --looks 4 --threads 1
    python benchmarks/grpo/compare.py --task one_sentence --plot

Each method has four settings, each trained for ``--search-minutes`` and measured on the 64 validation problems; the
best of them is trained anew for ``--minutes``, measured on the 64 held-out problems as it goes; ``--more`` adds runs
of the chosen settings with other seeds to the newest result of each. Needs the extra
``grpo``. Memory is the largest of the whole process, so it contains Python, torch and the float32 weights for both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, ROOT, hardware, slug

from eggroll.run.provenance import git_revision, versions

METHODS = ("eggroll", "grpo")
DEMO = {"optimizer": "sgd", "vectors": True}
COUNTDOWN: dict[str, list[dict[str, Any]]] = {
    # what `eggroll tune --task one_sentence` has, with half its population and prompts, and around that
    "eggroll": [
        {**DEMO, "lr": 0.05, "sigma": 0.01, "population_size": 16, "prompts_per_generation": 4},
        {**DEMO, "lr": 0.1, "sigma": 0.01, "population_size": 16, "prompts_per_generation": 4},
        {**DEMO, "lr": 0.05, "sigma": 0.02, "population_size": 16, "prompts_per_generation": 4},
        {**DEMO, "lr": 0.1, "sigma": 0.01, "population_size": 32, "prompts_per_generation": 2},
    ],
    # from TRL's default learning rate to a hundred times it; two groups of eight a step
    "grpo": [
        {"learning_rate": rate, "num_generations": 8, "per_device_train_batch_size": 16}
        for rate in (1e-6, 1e-5, 3e-5, 1e-4)
    ],
}
OTHERS: dict[str, list[dict[str, Any]]] = {
    # the task's own settings, and around them
    "eggroll": [{}, {"lr": 0.1}, {"sigma": 0.02}, {"population_size": 16}],
    # the rates that were good on Countdown; two groups of eight a step, or four
    "grpo": [
        *({"learning_rate": r, "num_generations": 8, "per_device_train_batch_size": 16} for r in (1e-5, 3e-5, 1e-4)),
        {"learning_rate": 3e-5, "num_generations": 8, "per_device_train_batch_size": 32},
    ],
}
COLORS = {"eggroll": "tab:blue", "grpo": "tab:orange"}
NAMES = {"eggroll": "EGGROLL", "grpo": "GRPO (TRL)"}


def one_run(args: argparse.Namespace, method: str, setting: dict[str, Any], **options: Any) -> dict[str, Any]:
    """One run in a process of its own; its result, or what it said when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, str(Path(__file__).with_name("one_run.py")), "--method", method]
        command += ["--setting", json.dumps(setting), "--out", str(out), "--device", args.device]
        command += ["--model", args.model, "--task", args.task, "--shots", str(args.shots)]
        command += ["--threads", str(args.threads)] if args.threads else []
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not out.exists():
            return {"setting": setting, "error": done.stderr.strip().splitlines()[-1:]}
        return dict(json.loads(out.read_text()))


def last(run: dict[str, Any]) -> float:
    return float(run["curve"][-1]["reward"]) if "curve" in run else float("-inf")


def compare(args: argparse.Namespace, method: str) -> dict[str, Any]:
    searched = [
        one_run(args, method, setting, minutes=args.search_minutes, looks=1, split="validation", seed=args.seeds[0])
        for setting in (COUNTDOWN if args.task == "countdown" else OTHERS)[method]
    ]
    for run in searched:
        print(method, json.dumps(run["setting"]), last(run), run.get("steps"), run.get("error"), flush=True)
    best = max(searched, key=last)["setting"]
    return {"search": searched, "chosen": best, "runs": final_runs(args, method, best)}


def final_runs(args: argparse.Namespace, method: str, best: dict[str, Any]) -> list[dict[str, Any]]:
    """The chosen setting, trained with each seed."""
    return [
        one_run(args, method, best, minutes=args.minutes, looks=args.looks, split="heldout", seed=seed)
        for seed in args.seeds
    ]


def newest(folder: Path, task: str, method: str) -> Path | None:
    return max(folder.glob(f"{slug(task)}-{method}_*.json"), default=None)


def plot(folder: Path, task: str) -> None:
    """The newest result of each method in one picture and one table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = {method: newest(folder, task, method) for method in METHODS}
    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    form = task == "countdown"
    lines = ["| | chosen | searched | minutes | steps | completions | start | best | end |"
             f"{' of it format |' if form else ''} right | peak MiB |",
             "|---|---|---|---|---|---|---|---|---|---|---|" + ("---|" if form else "")]  # fmt: skip
    for method, file in files.items():
        if file is None:
            continue
        result = json.loads(file.read_text())
        searched = ", ".join(f"{last(run):.3f}" if "curve" in run else "failed" for run in result["search"])
        chosen = ", ".join(f"{key} {value}" for key, value in result["chosen"].items()) or "the task's own"
        for number, run in enumerate(run for run in result["runs"] if "curve" in run):
            curve = run["curve"]
            axes.plot(
                [look["seconds"] / 60 for look in curve], [look["reward"] for look in curve], marker="o", markersize=3,
                color=COLORS[method], label=NAMES[method] if number == 0 else None,
            )  # fmt: skip
            first, end = curve[0], curve[-1]
            best = max(look["reward"] for look in curve)
            formed = f" {end['format']:.2f} |" if form else ""
            lines.append(
                f"| {NAMES[method]}, seed {run['seed']} | {chosen} | {searched} "
                f"| {run['seconds'] / 60:.1f} | {run['steps']} | {run['completions']:,} "
                f"| {first['reward']:.3f} | {best:.3f} | {end['reward']:.3f} |"
                f"{formed} {end['right']:.3f} | {run['mib_peak']:,} |"
            )
    if form:
        axes.axhline(0.1, color="0.7", linewidth=1, linestyle="--", label="the form alone")
    title = "Countdown, SmolLM2-135M, two worked examples" if form else f"{task}, SmolLM2-135M"
    axes.set(xlabel="minutes of training", ylabel="held-out reward", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / f"{slug(task)}.png", dpi=120)
    (folder / f"{slug(task)}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="one_sentence")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--search-minutes", type=float, default=6.0, help="for each of the four settings")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--looks", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shots", type=int, default=0, help="worked examples (countdown: 2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--more", action="store_true", help="no search: more seeds for the newest results")
    parser.add_argument("--plot", action="store_true", help="only the picture and the table of what is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "grpo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.plot:
        for method in args.methods:
            path = newest(args.out, args.task, method)
            if args.more and path is not None:
                known = json.loads(path.read_text())
                known["runs"] += [
                    {**run, "revision": git_revision(ROOT)} for run in final_runs(args, method, known["chosen"])
                ]
                path.write_text(json.dumps(known, indent=1) + "\n")
                continue
            result = compare(args, method)
            head = {
                "what": "grpo_comparison", "task": args.task, "method": method,
                "hardware": hardware(args.device), "threads": args.threads,
                "load": [round(x, 1) for x in os.getloadavg()], "revision": git_revision(ROOT), "versions": versions(),
                "date": str(datetime.date.today()),
            }  # fmt: skip
            path = args.out / f"{slug(args.task)}-{method}_{slug(hardware(args.device))}_{datetime.date.today()}.json"
            path.write_text(json.dumps({**head, **result}, indent=1) + "\n")
    plot(args.out, args.task)


if __name__ == "__main__":
    main()
