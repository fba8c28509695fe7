"""A recipe over several seeds: its result, wall time and spread, as committed in results/recipes.

    python benchmarks/recipe_seeds.py cartpole --seeds 0 1 2 3 4
    python benchmarks/recipe_seeds.py mnist --seeds 0 1 2 --options "--backprop" --threads 1
    python benchmarks/recipe_seeds.py mnist --runs runs/a runs/b --threads 1      runs that are there already

Each seed is one ``eggroll recipe NAME --seed S`` in a process of its own, one after the other. Settings were chosen on
the held-out part of MNIST's training set (CartPole's were the first that were tried), never on what is reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, hardware, slug

from eggroll.run.provenance import git_revision, versions


def run_seed(name: str, seed: int, directory: Path, extra: list[str], threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "eggroll.cli.main", "recipe", name, "--seed", str(seed)]
    command += ["--output", str(directory), "--report-to", "none", *extra]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return {**collect(directory), "wall_s": round(time.perf_counter() - start, 1)}


def collect(directory: Path) -> dict[str, Any]:
    """What a run directory says."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curve = [
        (line["generation"], round(line.get("elapsed_s", 0.0), 2), line["heldout_reward"])
        for line in lines
        if "heldout_reward" in line
    ]
    result = json.loads((directory / "result.json").read_text())
    options = json.loads((directory / "config.json").read_text())["options"]
    return {"seed": options["seed"], **result, "curve": curve, "options": options}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, nargs="+", help="collect these run directories instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--options", default="", help="further options of the recipe, as one word")
    parser.add_argument("--why", default="", help="a sentence for the result file")
    options = parser.parse_args()
    extra = shlex.split(options.options)
    with tempfile.TemporaryDirectory() as temporary:
        seeds = (
            [collect(path) for path in options.runs]
            if options.runs
            else [run_seed(options.recipe, s, Path(temporary) / str(s), extra, options.threads) for s in options.seeds]
        )
    settings = seeds[0]["options"]
    for seed in seeds:
        assert {**seed.pop("options"), "seed": 0, "output": 0} == {**settings, "seed": 0, "output": 0}
    numbers = [key for key, value in seeds[0].items() if isinstance(value, int | float) and key != "seed"]
    summary = {
        key: {
            "mean": statistics.mean(seed[key] for seed in seeds),
            "min": min(seed[key] for seed in seeds),
            "max": max(seed[key] for seed in seeds),
        }
        for key in numbers
    }
    print(json.dumps(summary, indent=1))
    today = datetime.date.today().isoformat()
    path = RESULTS / "recipes" / f"{options.recipe}_{slug(hardware())}_{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "what": options.recipe,
        "command": f"eggroll recipe {options.recipe} --seed SEED {options.options}".strip(),
        "hardware": hardware(),
        "threads": options.threads,
        "date": today,
        "git": git_revision(ROOT),
        "versions": versions(),
        "why": options.why,
        "options": {key: value for key, value in settings.items() if key not in ("seed", "output", "data", "resume")},
    }
    path.write_text(json.dumps({**facts, "summary": summary, "seeds": seeds}, indent=1) + "\n")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
