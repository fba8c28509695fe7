"""A model in bfloat16, int8, int4 and its GGUF blocks: plain inference against the population, time and memory.

    python benchmarks/bench_quantized.py [--forms bfloat16 int8 int4 gguf] [--members 32]

All forms are loaded at once and measured in turns: reading prompts (8 members x 64 tokens by default) and writing
tokens (a row for each member). The population is compared with plain inference of the same weights, and every form
with bfloat16. Memory is measured in processes of their own, as ``bench_memory.py`` does (Linux only): the peak while
writing, from when the libraries are loaded, so without them; and the peak of whole generations, updates and all, with
the residual stored (masters in bfloat16), or rebuilt from the scores of the last 50 generations.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import partial
from typing import Any

import common
import numpy as np
import torch
from bench_memory import PROCESS, forget_peak, resident
from bench_population_forward import Bench

from eggroll import ESConfig, llm
from eggroll.llm.generation.generate import generate
from eggroll.torch import Population, Replica
from eggroll.torch.quantized.adopt import grids
from eggroll.torch.replica import MATRIX_KINDS

MEASURE = "time of plain inference / time of the population, same rows and weights, rank 1, noise already drawn"
MEMORY = "memory of the population / of plain inference"
PLAIN = "bfloat16"
KINDS = {
    "plain": None,
    "population": None,
    "stored": {},
    "rebuilt": {"residual_generations": 50, "residual_decay": 0.9},
}
"""What a process does: write plainly, write as a population, or train, with these settings."""
TARGETS = {"rebuilt": 1.25}
TRAINED = 3
"""Generations of a process that trains: the first update makes masters or residuals, the later ones use them."""


def load(form: str, source: str, layers: int | None) -> Any:
    """The model in a form, or its first layers; everything that is not quantized is in bfloat16."""
    model = llm.load(source, dtype="bfloat16", quantize="none" if form == PLAIN else form).model
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def weight_bytes(model: Any) -> int:
    """Of all parameters, tied ones once; of quantized ones codes, scales and offsets."""
    held = grids(model)
    plain = sum(p.nbytes for name, p in model.named_parameters() if name not in held)
    return plain + sum(int(sum(grid.bits) * grid.shape.numel() / 8) for grid in held.values())


@torch.no_grad()
def child(job: dict[str, Any]) -> dict[str, int]:
    """Prompts read and some tokens written, plain, by the population or in generations: peak memory over libraries."""
    from transformers import AutoModelForCausalLM  # noqa: F401  (libraries are loaded before the first look)

    torch.set_num_threads(job["threads"])
    before = forget_peak()
    model = load(job["form"], job["model"], job["layers"])
    loaded = forget_peak()  # what loading took for a while does not count
    # Not transformers' loop: its prefill copies the output head once for each row in bfloat16, 1.7 GiB here.
    ids = torch.arange(1, job["length"] + 1).repeat(job["members"], 1)
    words: dict[str, Any] = {"max_tokens": job["steps"], "eos_ids": [], "pad_id": 0}
    settings, train = {"population_size": job["members"], "sigma": 0.01, "rank": 1}, KINDS[job["kind"]]
    replica = None
    if train is not None:
        config = ESConfig(**settings, lr=1e-3, generations=TRAINED, optimizer="sgd", **train)
        replica = Replica(model, config, kinds=MATRIX_KINDS)
    population = replica.population if replica else Population(model, **settings, kinds=MATRIX_KINDS)
    for generation in range(TRAINED if replica else 1):
        if job["kind"] != "plain":
            population.prepare(generation)
        with contextlib.nullcontext() if job["kind"] == "plain" else population.perturbed(generation):
            generate(model, ids, torch.ones_like(ids), **words)
        if replica:
            scores = np.random.default_rng(generation).standard_normal(job["members"])
            replica.update(generation, scores.astype(np.float32), 1e-3)
    return {"peak": resident("VmHWM") - before, "model": loaded - before, "weights": weight_bytes(model)}


def run(job: dict[str, Any]) -> dict[str, int]:
    """:func:`child` in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a measurement failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def memory(args: Any) -> list[dict[str, Any]]:
    """Ratios of peaks, and the bytes behind them."""
    rows = []
    for form in args.forms:
        job = {
            "form": form,
            "model": args.model,
            "layers": args.layers,
            "members": args.members,
            "length": args.length,
            "steps": args.steps,
            "threads": torch.get_num_threads(),
        }
        kinds = [kind for kind in KINDS if form != PLAIN or kind != "rebuilt"]
        found: dict[str, list[dict[str, int]]] = {kind: [] for kind in kinds}
        for _ in range(1 if args.quick else args.turns):
            for kind, measured in found.items():
                measured.append(run({**job, "kind": kind}))
        peaks = {kind: [float(m["peak"]) for m in measured] for kind, measured in found.items()}
        for kind in kinds[1:]:
            case = f"memory, {args.members} rows, {form}" + ("" if kind == "population" else f", trained, {kind}")
            ratio = common.ratio(peaks, kind, "plain")
            target = TARGETS.get(kind) if form == "int4" else None
            rows.append(common.row(case, ratio, target=target, lower_is_better=True, bytes=found))
            common.say(rows[-1])
        middle = ", ".join(f"{kind} {common.spread(peaks[kind])['median'] / 2**20:,.0f}" for kind in kinds)
        print(f"  MiB: weights {found['plain'][0]['weights'] / 2**20:,.0f}, peaks: {middle}", flush=True)
    return rows


def speed(args: Any) -> list[dict[str, Any]]:
    """Ratios of times: the population against plain inference, and each form against bfloat16."""
    models = {form: load(form, args.model, args.layers) for form in args.forms}
    rows = []
    for what, members in (("prefill", args.prefill_members), ("decode", args.members)):
        check = what == "decode" and not args.quick
        benches = {
            form: Bench(model, MATRIX_KINDS, members, args.length, args.steps, check) for form, model in models.items()
        }
        variants: dict[str, Any] = {}
        for form, bench in benches.items():
            measure = bench.prefill_seconds if what == "prefill" else bench.decode_seconds
            ids = bench.tokens(members)
            variants |= {
                f"{form} plain": partial(measure, ids, False),
                f"{form} population": partial(measure, ids, True),
            }
        times = common.alternate(variants, turns=args.turns)
        shape = f"{members} x {args.length} tokens" if what == "prefill" else f"{members} rows"
        for form in args.forms:
            own = {name: times[f"{form} {name}"] for name in ("plain", "population")}
            rows.append(common.row(f"{what}, {shape}, {form}", common.ratio(own, "plain", "population"), seconds=own))
            if form != PLAIN and PLAIN in args.forms:
                for kind in ("plain", "population"):
                    ratio = common.ratio(times, f"{PLAIN} {kind}", f"{form} {kind}")
                    rows.append(common.row(f"{what}, {shape}, {kind} in {form} over bfloat16", ratio))
        for line in rows[-(3 * len(args.forms) - 2) :]:
            common.say(line)
    return rows


@torch.no_grad()
def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps(child(json.loads(sys.argv[-1]))))
        return
    made = common.parser(__doc__, turns=5, model=False)
    made.add_argument("--model", default=common.MODEL, help="alias, directory or hub id")
    made.add_argument("--forms", nargs="+", default=[PLAIN, "int8", "int4", "gguf"], help="bfloat16 int8 int4 gguf")
    made.add_argument("--members", type=int, help="members that write, a row each (default 32)")
    made.add_argument("--prefill-members", type=int, default=8, help="members that read a prompt each (default 8)")
    made.add_argument("--length", type=int, default=64, help="tokens of a prompt (default 64)")
    made.add_argument("--steps", type=int, default=8, help="tokens written per measurement (default 8)")
    args = common.begin(made)
    args.layers = 2 if args.quick else None
    if args.quick:
        args.length, args.steps, args.prefill_members = 8, 2, 2
    rows = speed(args)
    if (PROCESS / "clear_refs").exists():
        rows += memory(args)
    common.finish("quantized", f"{MEASURE}; {MEMORY}", rows, args, model=args.model, members=args.members, rank=1)


if __name__ == "__main__":
    main()
