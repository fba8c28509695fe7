"""Generated tokens per second: members as adapters of vLLM, vLLM without adapters, and the PyTorch evaluator.

    .venv-vllm/bin/python benchmarks/serving/throughput.py [--members 32] [--prompts 4] [--max-tokens 32] [--rank 1]

One process, in turns, the same prompts and the same number of rows. Completions have the same length everywhere: ends
are ignored. Each turn of vLLM has another generation, so that drawing the members and setting their adapters is
part of it and nothing comes from the prefix cache; so has each turn of PyTorch. Medians over the turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

PROMPTS = ["What is the capital of France?", "Name a fruit and its colour.", "Say hello to a friend.", "What is 2+2?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "vllm")
    args = parser.parse_args()
    import torch
    from common import alternate, hardware, slug

    from eggroll import EggrollConfig, EggrollTrainer, llm
    from eggroll.llm.data.examples import load_examples
    from eggroll.run.provenance import git_revision, versions
    from eggroll.vllm_backend import VllmEggrollTrainer

    load = os.getloadavg()[0]
    config = EggrollConfig(
        population_size=args.members, rank=args.rank, sigma=0.01, generations=1, max_tokens=args.max_tokens,
        max_length=128, prompts_per_generation=args.prompts, eval_every=0,
    )  # fmt: skip
    examples = load_examples([PROMPTS[i % len(PROMPTS)] for i in range(args.prompts)])

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    engine = VllmEggrollTrainer(args.model, config, reward, dtype=args.dtype)
    loaded = llm.load(args.model, dtype=args.dtype, device="cpu")
    plain = EggrollTrainer(loaded.model, config, reward, loaded.tokenizer)
    evaluator = engine.worker.evaluator
    evaluator.eos_ids = []
    plain.worker.evaluator.eos_ids = []
    plain.worker.evaluator.choose_mode(examples)
    sampling = evaluator._sampling

    def without_end(generation: int, row: int) -> Any:
        made = sampling(generation, row)
        made.ignore_eos = True
        return made

    evaluator._sampling = without_end  # type: ignore[method-assign]
    rows = args.members * args.prompts
    turn = {"vllm": 0, "torch": 0}

    def timed(function: Any) -> float:
        start = time.perf_counter()
        made = function()
        taken = time.perf_counter() - start
        assert made == rows * args.max_tokens, made
        return taken

    def members(name: str, trainer: Any) -> float:
        turn[name] += 1
        return timed(lambda: trainer.worker.evaluator.evaluate(turn[name], config.sigma, examples).tokens)

    def without_adapters() -> float:
        engine.engine.llm.reset_prefix_cache()
        return timed(lambda: evaluator.complete(examples, None, 0, range(args.members))[1])

    times = alternate(
        {
            "vllm_members": lambda: members("vllm", engine),
            "vllm_plain": without_adapters,
            "torch_members": lambda: members("torch", plain),
        },
        turns=args.turns,
    )
    tokens = rows * args.max_tokens
    rates = {name: [tokens / taken for taken in taken_] for name, taken_ in times.items()}
    ratios = {
        "vllm_members / vllm_plain": [p / m for m, p in zip(times["vllm_members"], times["vllm_plain"], strict=True)],
        "vllm_members / torch_members": [
            p / m for m, p in zip(times["vllm_members"], times["torch_members"], strict=True)
        ],
    }
    result = {
        "what": "vllm_throughput", "hardware": hardware(), "threads": torch.get_num_threads(), "load_before": load,
        "model": args.model, "dtype": args.dtype, "members": args.members, "prompts": args.prompts,
        "max_tokens": args.max_tokens, "rank": args.rank, "turns": args.turns,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratios": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in ratios.items()
        },
        "seconds": times, "revision": git_revision(ROOT), "versions": versions(), "date": str(datetime.date.today()),
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("tokens_per_s", "ratios", "load_before")}, indent=1))
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"throughput_rank{args.rank}_{args.dtype}_{slug(hardware())}_{datetime.date.today()}.json"
    (args.results / name).write_text(json.dumps(result, indent=1) + "\n")
    engine.cleanup()


if __name__ == "__main__":
    main()
