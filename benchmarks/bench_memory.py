"""Peak memory of a population's evaluation against plain inference on the same rows, each in a process of its own.

    python benchmarks/bench_memory.py [--dtypes float32 bfloat16] [--device cuda] [--members 32]

On a CPU the peak is the largest resident memory of the process (VmHWM, Linux only) from when the model is loaded:
Python and its libraries are in it. The lines "beyond the libraries" leave out what was resident before the model was
loaded. On a GPU it is torch's own count. Both evaluate twice; neither updates, so there are no master weights.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

MEASURE = "peak memory of the population's evaluation / of plain inference, same rows, rank 1, no master weights"
TARGET = 1.10
LENGTH, NEW_TOKENS = 64, 32
QUESTION = "Why is the sky blue?"
PROCESS = Path("/proc/self")


def resident(key: str) -> int:
    """Bytes of a line of ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most so far."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> int:
    """Give free memory back and let the peak start again from what is resident now; returns that."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")
    return resident("VmRSS")


@torch.no_grad()
def child(job: dict[str, Any]) -> dict[str, int]:
    """One evaluation, with members or plain: peak, what was there before the model, and what the model takes."""
    from transformers import AutoModelForCausalLM  # noqa: F401  (libraries are loaded before the first look)

    from eggroll import llm
    from eggroll.llm.backends.torch import TorchEvaluator
    from eggroll.llm.config import EggrollConfig
    from eggroll.llm.data.examples import Example
    from eggroll.llm.rewards import PerplexityReward
    from eggroll.llm.rewards.load import as_reward
    from eggroll.torch import Population
    from eggroll.torch.replica import MATRIX_KINDS

    torch.set_num_threads(job["threads"])
    device, members = torch.device(job["device"]), job["members"]
    cuda = device.type == "cuda"
    before = 0 if cuda else forget_peak()
    loaded = llm.load(job["model"], dtype=job["dtype"], device=device)
    config = EggrollConfig(
        population_size=members, rank=1, max_tokens=job["tokens"], members_per_forward=members, samples_per_generation=0
    )
    scored = job["kind"] == "perplexity"
    copies = job["rows_per_member"] * (1 if job["population"] else members)
    reward = PerplexityReward(loaded.tokenizer) if scored else as_reward(_length, loaded.tokenizer)
    population = Population(loaded.model, population_size=members, rank=1, kinds=MATRIX_KINDS, mode="rows")
    evaluator = TorchEvaluator(population, loaded.tokenizer, reward, config)
    evaluator.eos_ids = []
    batch: Any
    if scored:
        vocabulary = loaded.model.get_input_embeddings().num_embeddings  # the first ones are special, these are words
        ids: Tensor = torch.arange(vocabulary - job["tokens"], vocabulary).repeat(copies, 1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        batch = [Example(QUESTION)] * copies
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    after = torch.cuda.memory_allocated(device) if cuda else forget_peak()
    for generation in range(2):
        if job["population"]:
            evaluator.evaluate(generation, config.sigma, batch)
        elif scored:
            reward.log_likelihood(loaded.model, batch)
        else:
            evaluator.complete(batch, None, 0, range(1))
    peak = torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")
    return {"peak": peak, "before": before, "model": after - before}


def _length(text: str) -> float:
    return float(len(text))


def run(job: dict[str, Any]) -> dict[str, int]:
    """:func:`child` in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a measurement failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lines(job: dict[str, Any], turns: int) -> list[dict[str, Any]]:
    """Ratios of one case, turn by turn."""
    found: dict[str, list[dict[str, int]]] = {"plain": [], "population": []}
    for _ in range(turns):
        for name, measured in found.items():
            measured.append(run({**job, "population": name == "population"}))
    what = f"{job['tokens']} tokens" if job["kind"] == "perplexity" else f"{job['tokens']} new tokens"
    case = f"{job['kind']}, {job['members']} x {job['rows_per_member']} rows, {what}, {job['dtype']}"
    peaks = {name: [float(m["peak"]) for m in measured] for name, measured in found.items()}
    made = [common.row(case, common.ratio(peaks, "population", "plain"), target=TARGET, lower_is_better=True)]
    made[0]["bytes"] = found
    if torch.device(job["device"]).type == "cpu":
        own = {name: [float(m["peak"] - m["before"]) for m in measured] for name, measured in found.items()}
        figure = common.ratio(own, "population", "plain")
        made.append(common.row(f"{case}, beyond the libraries", figure, target=TARGET, lower_is_better=True))
    middle = {name: common.spread(values)["median"] / 2**20 for name, values in peaks.items()}
    print(", ".join(f"{name} {value:,.0f} MiB" for name, value in middle.items()))
    return made


def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps(child(json.loads(sys.argv[-1]))))
        return
    made = common.parser(__doc__, turns=5)
    args = common.begin(made)
    if torch.device(args.device).type == "cpu" and not (PROCESS / "clear_refs").exists():
        made.exit(2, "peak resident memory is read from /proc/self, which is there on Linux only; use --device cuda\n")
    cases = [("perplexity", 1, LENGTH), ("perplexity", 4, LENGTH), ("text", 1, NEW_TOKENS)]
    if args.quick:
        args.turns, cases = 1, [("perplexity", 1, 8), ("text", 1, 4)]
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        for kind, rows_per_member, tokens in cases:
            job = {
                "model": args.model,
                "dtype": dtype,
                "device": args.device,
                "threads": torch.get_num_threads(),
                "members": args.members,
                "kind": kind,
                "rows_per_member": rows_per_member,
                "tokens": tokens,
            }
            for line in lines(job, args.turns):
                rows.append(line)
                common.say(line)
    print()
    common.finish("memory", MEASURE, rows, args, model=args.model, members=args.members, rank=1)


if __name__ == "__main__":
    main()
