"""Normals per second of every version of the noise, next to torch.randn in the same process.

    python benchmarks/noise.py [--threads N] [--repeats 9] [--device cpu]

One measurement of each version in turn, and again, so that all of them see the same disturbances; the medians and the
median of the ratios of each turn go into the table and into benchmarks/results/noise_<hardware>_<date>.json.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from eggroll.torch import threefry
from eggroll.torch.kernels import threefry_c

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "one draw": (1, 1 << 22),
    "16 draws of 1152": (16, 1152),
    "4096 draws of 1152": (4096, 1152),
    "4096 draws of 64": (4096, 64),
}


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    return f"{model} {os.cpu_count()} cores"


def versions(device):
    """Name -> function that draws ``(K, count)``, each with its own setting of the environment."""

    def drawer(setting):
        def draw(keys, count):
            os.environ[threefry.COMPILE_VARIABLE] = setting
            return threefry.normals(keys, count, device=device)

        return draw

    if device != "cpu":
        return {"default": drawer("")}
    compiled = {} if threefry_c.why_not() else {"C": drawer("1")}
    return {"plain operations": drawer("0"), **compiled}


def seconds(function, device):
    time.sleep(0.02)  # the idle threads of the call before still spin for some milliseconds
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape, device, repeats):
    """Seconds per call for torch.randn and each version: ``{name: [seconds, ...]}``, one of each per turn."""
    num_keys, count = shape
    keys = np.random.default_rng(0).integers(0, 2**32, (num_keys, 2), dtype=np.uint32)
    calls = {"torch.randn": lambda: torch.randn(num_keys, count, device=device)}
    calls |= {name: lambda draw=draw: draw(keys, count) for name, draw in versions(device).items()}
    inner = min(20, max(1, (1 << 20) // (num_keys * count)))
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(min(seconds(call, device) for _ in range(inner)) if inner > 1 else seconds(call, device))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{hardware(args.device)}, {args.threads} threads, torch {torch.__version__}, float32")
    print(f"{'shape':<22}{'version':<20}{'million/s':>12}{'of torch.randn':>16}")
    for label, shape in SHAPES.items():
        times = measure(shape, args.device, args.repeats)
        for name, taken in times.items():
            rate = shape[0] * shape[1] / statistics.median(taken)
            ratio = statistics.median(base / mine for base, mine in zip(times["torch.randn"], taken, strict=True))
            row = {"shape": shape, "version": name, "normals_per_second": rate, "ratio_to_randn": ratio}
            rows.append(row | {"seconds": taken})
            print(f"{label:<22}{name:<20}{rate / 1e6:>12.1f}{ratio:>16.2f}")

    result = {
        "what": "float32 normals per second, median; ratio: median over turns of torch.randn's time over the version's",
        "hardware": hardware(args.device),
        "threads": args.threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    short = re.sub(r"[^a-z0-9]+", "-", f"{hardware(args.device)} {args.threads} threads".lower()).strip("-")
    path = RESULTS / f"noise_{short}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
