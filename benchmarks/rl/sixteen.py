"""The paper's sixteen environments in short runs: EGGROLL, full-rank ES and PPO at the same number of steps.

    python benchmarks/rl/sixteen.py [--only navix] [--kinds ppo] [--seeds 0] [--file benchmarks/results/rl/FILE.json]

Each run is one ``eggroll rl`` in a process of its own; budgets are minutes on two cores, hundreds of times below the
paper's 5e8 steps, so hyperparameters are one common set for short runs (``COMMON``), not the paper's, and were not
tuned for any environment. Returns are means over 64 held-out episodes. The table also gives steps per second of the
population and, on the same machine, of random actions with as many episodes at once. EGGROLL's and full-rank ES's
policies take their best action, as in the paper, PPO's sample theirs; ``--kinds sampled`` is EGGROLL with policies that
sample. PPO's steps are whole iterations of 8,192. Each result is written as soon as
it is there, into a file that may hold others already, so the table can be made in several sittings and by several
processes; a result carries its own date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

COMMON = {
    "rank": 1, "sigma": 0.1, "lr": 0.02, "optimizer": "adam", "lr_decay": 1.0, "sigma_decay": 1.0,
    "episodes": 1,
}  # fmt: skip
CALMER = {"sigma": 0.05, "lr": 0.005}
"""For brax, where a policy that does nothing survives, and some twenty updates of the common size end that."""
#        environment: (env steps in thousands, cut episodes off after, population)
RUNS: dict[str, tuple[int, int | None, int]] = {
    "CartPole-v1": (3000, None, 128),
    "Pendulum-v1": (6000, None, 128),
    "brax/ant": (130, 100, 64),
    "brax/humanoid": (50, 50, 64),
    "brax/inverted_double_pendulum": (300, 200, 64),
    "craftax/Craftax-Classic-Symbolic-AutoReset-v1": (200, 100, 64),
    "craftax/Craftax-Symbolic-AutoReset-v1": (50, 50, 64),
    "jumanji/Game2048-v1": (2000, 300, 128),
    "jumanji/Knapsack-v1": (600, None, 128),
    "jumanji/Snake-v1": (1000, 200, 128),
    "kinetix/l/hard_pinball": (40, 128, 32),
    "kinetix/m/h17_thrustcontrol_left": (100, 128, 64),
    "kinetix/s/h1_thrust_over_ball": (100, 128, 64),
    "navix/Navix-DoorKey-8x8-v0": (1500, None, 128),
    "navix/Navix-Dynamic-Obstacles-6x6-Random-v0": (1500, None, 128),
    "navix/Navix-FourRooms-v0": (600, None, 128),
}


def run(
    env: str, kind: str, steps: int, limit: int | None, members: int, seed: int, folder: Path, minutes: float
) -> dict[str, Any]:
    """One ``eggroll rl``; its result, with wall time."""
    out = folder / f"{kind}-{seed}"
    command = [sys.executable, "-m", "eggroll.cli.main", "rl", "--env", env, "--env_steps", str(steps), "-o", str(out)]
    command += ["--seed", str(seed), "--eval-episodes", "64", "--report-to", "none", "--no-render"]
    if limit is not None:
        command += ["--max-steps", str(limit)]
    if kind == "ppo":
        command += ["--algo", "ppo"]
    else:
        command += [
            "--noiser",
            "openes" if kind == "openes" else "eggroll",
            "-g",
            "100000",
            "--eval-every",
            "20",
            "--rank-transform",
            "True",
        ]
        settings = {**COMMON, **(CALMER if env.startswith("brax/") else {})}
        command += ["--pop_size", str(members), *(["--no-deterministic"] if kind == "sampled" else [])]
        command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=minutes * 60)
    except subprocess.TimeoutExpired:
        return {"error": f"not at its end after {minutes:g} minutes", "seed": seed, "date": str(datetime.date.today())}
    if done.returncode:
        return {"error": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][-300:], "seed": seed}
    result = json.loads((out / "result.json").read_text())
    curve = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values.get("heldout_reward") is not None:
            curve.append([values.get("env_steps", 0.0), round(values["heldout_reward"], 4)])
    wall = round(time.perf_counter() - began, 1)
    return {**result, "seed": seed, "wall_s": wall, "date": str(datetime.date.today()), "curve": curve}


RANDOM = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np
from eggroll.rl.envs import registry
from eggroll.rl.envs.base import Continuous, Discrete
env, episodes, steps = registry.make(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def action(key):
    space = env.actions
    if isinstance(space, Continuous):
        return jax.random.uniform(key, (space.size,), minval=jnp.asarray(space.low), maxval=jnp.asarray(space.high))
    if isinstance(space, Discrete):
        return jax.random.randint(key, (), 0, space.num)
    return jax.random.randint(key, (len(space.nums),), 0, jnp.array(space.nums))
def one(carry, now):
    states, total = carry
    keys = jax.random.split(now, episodes)
    states, observations, rewards, done = jax.vmap(env.step)(keys, states, jax.vmap(action)(keys))
    return (states, total + rewards.sum() + observations.sum()), None
@jax.jit
def play(key):
    states, _ = jax.vmap(env.reset)(jax.random.split(key, episodes))
    return jax.lax.scan(one, (states, 0.0), jax.random.split(key, steps))[0][1]
jax.block_until_ready(play(jax.random.key(0)))
times = []
for turn in range(5):
    began = time.perf_counter()
    jax.block_until_ready(play(jax.random.key(turn)))
    times.append(time.perf_counter() - began)
print(json.dumps(sorted(times)))
"""


def random_rate(env: str, limit: int | None, members: int) -> float | None:
    """Steps per second with random actions, as many episodes at once as the population has members."""
    steps = min(limit or 100, 100)
    command = [sys.executable, "-c", RANDOM, env, str(members), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return members * steps / statistics.median(json.loads(done.stdout.strip().splitlines()[-1]))


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| environment | steps | members | cut off after | EGGROLL | sampled actions | full-rank ES | PPO "
        "| steps/s | of random actions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def end(row: dict[str, Any], kind: str) -> str:
        runs = [run for run in row.get(kind, []) if "error" not in run]
        if not runs:
            errors = [run["error"] for run in row.get(kind, [])]
            return ("not ended" if all("not at its end" in text for text in errors) else "failed") if errors else ""
        values = [run["end_return"] for run in runs]
        spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
        start = statistics.mean(run["start_return"] for run in runs)
        return f"{start:.4g} → {statistics.mean(values):.4g}{spread}"

    for env, row in rows.items():
        runs = [run for run in row.get("eggroll", []) if "error" not in run]
        rate = statistics.median(run["env_steps_per_s"] or 0 for run in runs) if runs else 0
        part = f"{rate / row['random_steps_per_s']:.2f}" if rate and row.get("random_steps_per_s") else ""
        cells = [env, f"{row['steps']:,}", str(row["population"]), str(row["max_steps"] or ""), end(row, "eggroll")]
        cells += [end(row, kind) for kind in ("sampled", "openes", "ppo")]
        lines.append(f"| {' | '.join([*cells, f'{rate:,.0f}' if rate else '', part])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="environments whose name has this in it")
    parser.add_argument("--kinds", nargs="+", default=["eggroll", "openes", "ppo"])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--file", type=Path, help="results to add to (default: a new file in benchmarks/results/rl)")
    parser.add_argument("--minutes", type=float, default=30.0, help="give a run up after so long (default 30)")
    options = parser.parse_args()
    from common import hardware, slug

    from eggroll.run.provenance import git_revision, versions

    results = ROOT / "benchmarks" / "results" / "rl"
    path = options.file or results / f"sixteen_{slug(hardware())}_{datetime.date.today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "what": "rl_sixteen", "hardware": hardware(), "load_before": os.getloadavg()[0], "common": COMMON,
        "brax": CALMER,
        "revision": git_revision(ROOT), "versions": versions(), "date": str(datetime.date.today()),
    }  # fmt: skip

    def store(env: str, values: dict[str, Any]) -> dict[str, Any]:
        """Add to an environment's row of the file as it is now; the rows."""
        stored = json.loads(path.read_text()) if path.exists() else {**head, "rows": {}}
        stored["rows"].setdefault(env, {}).update(values)
        rows = {name: stored["rows"][name] for name in RUNS if name in stored["rows"]}
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({**stored, "rows": rows}, indent=1) + "\n")
        new.replace(path)
        path.with_suffix(".md").write_text(table(rows))
        return rows

    for env, (thousands, limit, members) in RUNS.items():
        if options.only not in env:
            continue
        steps = int(thousands * 1000 * options.scale)
        rows = store(env, {"steps": steps, "max_steps": limit, "population": members})
        if "random_steps_per_s" not in rows[env]:
            store(env, {"random_steps_per_s": random_rate(env, limit, members)})
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                place, minutes = Path(folder), options.minutes
                runs = [run(env, kind, steps, limit, members, seed, place, minutes) for seed in options.seeds]
            rows = store(env, {kind: runs})
            print(env, kind, [(r.get("end_return"), r.get("wall_s"), r.get("error")) for r in runs], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
