"""What a grid keeps of a change that was learned in floating point: rounded to nearest, and from a random start.

    python benchmarks/quantized/rounding.py --tuned runs/quantized/bfloat16-42/model --write

``--tuned`` is a model that ``eggroll tune smollm2-135m --task one_sentence`` has made from plain weights. What it
differs from SmolLM2-135M in is added to the codes of the GGUF file, in quanta: rounded to nearest, as a residual of
error feedback does that began at 0, or after a random part of a quantum is added, as one does that began there. Vectors
get their change as it is. Then the held-out questions are answered greedily.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, ROOT, hardware, slug

from eggroll import llm
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import load_examples
from eggroll.llm.measure.evaluate import evaluate
from eggroll.llm.tasks import get_task
from eggroll.run.provenance import git_revision, versions
from eggroll.torch.quantized.adopt import grids
from eggroll.torch.quantized.update import in_quanta_

MODEL, TASK = "smollm2-135m", "one_sentence"
STARTS = ("zero", "uniform")


def score(loaded: Any) -> float:
    """The mean reward of greedy answers to the held-out questions."""
    task = get_task(TASK)
    config = EggrollConfig(max_tokens=task.max_tokens, system=task.system)
    scores = evaluate(loaded, task, load_examples(task.heldout), config, batch_size=32).scores
    return sum(scores) / len(scores)


@torch.no_grad()
def moved(change: dict[str, Tensor], start: str, seed: int) -> tuple[float, Tensor]:
    """The score of the quantized model after the change, and a sample of the change's size in quanta."""
    loaded, sizes = llm.load(MODEL, quantize="gguf"), []
    make, found = torch.Generator().manual_seed(seed), grids(loaded.model)
    for name, grid in found.items():
        wanted = in_quanta_(change[name].clone(), grid.quanta())
        sizes.append(wanted.abs().flatten()[::97])
        if start == "uniform":
            wanted += torch.rand(wanted.shape, generator=make) - 0.5
        codes = (grid.codes().float() + wanted.round()).clamp_(grid.low, grid.high)
        grid.set_codes(codes.to(grid.codes().dtype))
    for name, parameter in loaded.model.named_parameters():
        if name not in found and name in change:
            parameter.add_(change[name].to(parameter.dtype))
    return score(loaded), torch.cat(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", required=True, help="a tuned model's directory")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the random starts")
    parser.add_argument("--write", action="store_true", help="write the result file")
    given = parser.parse_args()
    tuned = llm.load(given.tuned, dtype="float32")
    plain = llm.load(MODEL, dtype="float32")
    before, after = plain.model.state_dict(), tuned.model.state_dict()
    change = {name: (after[name] - value).float() for name, value in before.items()}
    result: dict[str, Any] = {"before": score(plain), "after": score(tuned)}
    result["zero"], sizes = moved(change, "zero", 0)
    result["uniform"] = [moved(change, "uniform", seed)[0] for seed in given.seeds]
    result["quanta"] = {
        "median": float(sizes.median()), "mean": float(sizes.mean()), "above_half": float((sizes > 0.5).float().mean()),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if given.write:
        today = datetime.date.today().isoformat()
        facts = {"hardware": hardware(), "date": today, "revision": git_revision(ROOT), "versions": versions()}
        path = RESULTS / "quantized" / f"rounding_{slug(hardware())}_{today}.json"
        path.write_text(
            json.dumps({"what": "rounding of a learned change to Q4_1", **facts, **result}, indent=1) + "\n"
        )
        print(path)


if __name__ == "__main__":
    main()
