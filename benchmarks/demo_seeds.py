"""The demo over several seeds: held-out reward before and after, wall time, spread.

    python benchmarks/demo_seeds.py                      the three seeds of the README, about 20 minutes on two cores

Each seed is one ``eggroll tune smollm2-135m --task one_sentence --seed S`` in a process of its own; the result file
holds what its run directory says. Settings were chosen on the task's validation questions, never on the held-out ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, ROOT, hardware, slug

from eggroll.run.provenance import git_revision, versions


def run_seed(seed: int, directory: Path, extra: list[str]) -> dict:
    command = [sys.executable, "-m", "eggroll.cli.main", "tune", "smollm2-135m", "--task", "one_sentence"]
    command += ["--seed", str(seed), "--output", str(directory), *extra]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    heldout = [(line["generation"], line["heldout_reward"]) for line in lines if "heldout_reward" in line]
    evaluate = [line["evaluate_s"] for line in lines if "evaluate_s" in line]
    before, after = heldout[0][1], heldout[-1][1]
    best = max(value for generation, value in heldout if generation > 0)
    return {
        "seed": seed,
        "heldout_before": before,
        "heldout_after": after,
        "heldout_best": best,  # the saved model's; picked on these questions, so it flatters
        "part_of_distance_to_best": (after - before) / (1.0 - before),
        "curve": heldout,
        "generations": heldout[-1][0],
        "wall_s": seconds,
        "median_generation_s": statistics.median(evaluate),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--quick", action="store_true", help="one seed, two generations")
    options = parser.parse_args()
    seeds, extra = (options.seeds[:1], ["--generations", "2"]) if options.quick else (options.seeds, [])
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in seeds:
            results.append(run_seed(seed, Path(temporary) / str(seed), extra))
    after = [result["heldout_after"] for result in results]
    parts = [result["part_of_distance_to_best"] for result in results]
    summary = {
        "heldout_before": results[0]["heldout_before"],
        "heldout_after_mean": statistics.mean(after),
        "heldout_after_min": min(after),
        "heldout_after_max": max(after),
        "part_of_distance_mean": statistics.mean(parts),
        "part_of_distance_min": min(parts),
        "below_best_max": max(result["heldout_best"] - result["heldout_after"] for result in results),
        "wall_s_max": max(result["wall_s"] for result in results),
    }
    print(json.dumps(summary, indent=2))
    if options.quick:
        return
    today = datetime.date.today().isoformat()
    path = RESULTS / "demo" / f"demo_{slug(hardware())}_{today}.json"
    facts = {"hardware": hardware(), "date": today, "revision": git_revision(ROOT), "versions": versions()}
    path.write_text(json.dumps({"what": "demo", **facts, "summary": summary, "seeds": results}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
