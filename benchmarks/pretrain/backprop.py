"""The paper's baseline by backpropagation: a transformer (6 layers, 256 wide, float32) with SGD and with Adam.

    python benchmarks/pretrain/backprop.py --data tinyshakespeare.txt --minutes 30

The same bytes and the same last tenth held out as for ``eggroll pretrain``, in windows of 256 that begin with nothing
(there they are 1024, which is of use to a recurrent state only). The transformer is transformers' GPT-2 of that size.
Its learning rates come from short runs on the training part, cosine to a tenth, warm-up over the first 2 %, gradients
clipped to norm 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

CONTEXT = 256
RATES = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (0.03, 0.1, 0.3)}


def make_model(layers: int, width: int, seed: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=max(1, width // 64),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def loss_of(model: Any, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: Any, stream: np.ndarray) -> float:
    """In windows of ``CONTEXT`` bytes that begin with nothing, each byte predicted once."""
    model.eval()
    count = (len(stream) - 1) // CONTEXT
    total = 0.0
    for start in range(0, count, 32):
        rows = [stream[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in range(start, min(start + 32, count))]
        total += float(loss_of(model, torch.from_numpy(np.stack(rows).astype(np.int64)))) * len(rows)
    model.train()
    return total / count / math.log(2)


def train(
    args: argparse.Namespace, kind: str, rate: float, minutes: float, data: Any, held: Any, looks: int = 0
) -> dict[str, Any]:
    """Train for so many minutes; the learning rate follows the time that has passed."""
    model = make_model(args.n_layers, args.hidden, args.seed)
    if kind == "adam":
        rule: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    else:
        rule = torch.optim.SGD(model.parameters(), lr=rate, momentum=args.momentum)
    rng = np.random.default_rng(args.seed)
    began, spent, steps = time.perf_counter(), 0.0, 0
    curve: list[list[float]] = []
    next_look = 0.0 if looks else math.inf
    while spent < 60 * minutes:
        progress = spent / (60 * minutes)
        factor = min(1.0, progress / 0.02) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        for group in rule.param_groups:
            group["lr"] = rate * max(factor, 1e-3)
        starts = rng.integers(0, len(data) - CONTEXT - 1, args.batch)
        windows = np.stack([data[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
        rule.zero_grad(set_to_none=True)
        loss = loss_of(model, torch.from_numpy(windows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        steps += 1
        spent = time.perf_counter() - began
        if spent >= next_look:
            look = time.perf_counter()
            curve.append([steps * args.batch * CONTEXT, round(spent, 1), round(bits_per_byte(model, held[:32769]), 4)])
            began += time.perf_counter() - look  # looking does not count
            next_look += 60 * minutes / looks
    return {
        "optimizer": kind, "learning_rate": rate, "minutes": minutes, "steps": steps, "loss": float(loss.detach()),
        "tokens": steps * args.batch * CONTEXT, "tokens_per_s": steps * args.batch * CONTEXT / spent,
        "validation_bits_per_byte": bits_per_byte(model, held),
        "parameters": sum(p.numel() for p in model.parameters()), "curve": curve,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--search-minutes", type=float, default=1.0, help="per learning rate")
    parser.add_argument("--n-layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--optimizers", nargs="+", default=["adam", "sgd"], choices=sorted(RATES))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pretrain")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    from common import hardware, slug

    from eggroll.pretrain.data import load_corpus
    from eggroll.run.provenance import git_revision, versions

    corpus = load_corpus(str(args.data))
    data, held = np.asarray(corpus.train), np.asarray(corpus.validation)
    # Rates are compared on a part of the training text that these short runs do not see.
    part = len(data) * 19 // 20
    runs = {}
    for kind in args.optimizers:
        found = {
            r: train(args, kind, r, args.search_minutes, data[:part], data[part : part + 16385]) for r in RATES[kind]
        }
        search = {str(rate): round(run["validation_bits_per_byte"], 4) for rate, run in found.items()}
        best = min(found, key=lambda rate: found[rate]["validation_bits_per_byte"])
        runs[kind] = {**train(args, kind, best, args.minutes, data, held, looks=10), "search": search}
        print(kind, search, round(runs[kind]["validation_bits_per_byte"], 4), flush=True)
    head = {
        "what": "pretrain_backprop", "data": args.data.name, "hardware": hardware(), "threads": args.threads,
        "load": [round(x, 1) for x in os.getloadavg()], "revision": git_revision(ROOT), "versions": versions(),
        "settings": {"layers": args.n_layers, "hidden": args.hidden, "batch": args.batch, "context": CONTEXT,
                     "momentum": args.momentum, "seed": args.seed}, "date": str(datetime.date.today()),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"backprop_{slug(hardware())}_{datetime.date.today()}.json"
    path.write_text(json.dumps({**head, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
