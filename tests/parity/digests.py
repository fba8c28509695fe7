"""Record the digests of the runs in runs.py, or compare them with those that were recorded.

    python tests/parity/digests.py --record [--only NAME ...]
    python tests/parity/digests.py --check [--only NAME ...] [--fast]

Runs in floating point have the same digests only on a machine of the same kind with the same libraries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("digests.json")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
PACKAGES = (
    *("numpy", "torch", "transformers", "tokenizers", "jax", "jaxlib", "optax", "gymnax", "gymnasium"),
    "scikit-learn",
)
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
}


def facts() -> dict[str, Any]:
    """What floating-point results depend on here: the processor and the libraries."""
    flags, vendor = set(), ""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            flags = set(value.split())
        if key.strip() == "vendor_id":
            vendor = value.strip()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "machine": platform.machine(),
        "vendor": vendor,
        **{flag: flag in flags for flag in FLAGS},
        "versions": versions,
    }


def differing(recorded: dict[str, Any]) -> list[str]:
    """The facts of this machine that are not those of the recorded digests, one sentence each."""
    here = facts()
    flat = [{**values, **values["versions"]} for values in (recorded, here)]
    return [
        f"{name}: {flat[0][name]} recorded, {flat[1].get(name)} here"
        for name in flat[0]
        if name != "versions" and flat[0][name] != flat[1].get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", action="store_true", help="write digests.json")
    what.add_argument("--check", action="store_true", help="compare with digests.json")
    parser.add_argument("--only", action="append", metavar="NAME", help="this run; may be given several times")
    parser.add_argument("--fast", action="store_true", help="leave out runs that take over ten seconds")
    given = parser.parse_args()
    os.environ.update(SETTINGS)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from parity.runs import BY_NAME, RUNS, make

    unknown = sorted(set(given.only or ()) - set(BY_NAME))
    if unknown:
        parser.error(f"there is no run {', '.join(unknown)}; there are: {', '.join(BY_NAME)}")
    chosen = [run for run in RUNS if (not given.only or run.name in given.only) and not (given.fast and run.slow)]
    recorded: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"facts": facts(), "runs": {}}
    if given.check:
        for line in differing(recorded["facts"]):
            print(f"another machine than the recorded one, {line}", file=sys.stderr)

    import torch

    torch.set_num_threads(1)
    made: dict[str, dict[str, str]] = {}
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_HOME"] = place  # no data set of this machine
        for run in chosen:
            folder = Path(place) / run.name
            folder.mkdir()
            began = time.perf_counter()
            try:
                made[run.name] = make(run, folder)
            except Exception as error:
                wrong += 1
                print(f"{run.name:26} FAILED {error}", flush=True)
                continue
            seconds = time.perf_counter() - began
            if given.record:
                print(f"{run.name:26} {seconds:5.1f} s  {', '.join(made[run.name])}", flush=True)
                continue
            before = recorded["runs"].get(run.name, {})
            kinds = dict.fromkeys([*before, *made[run.name]])
            results = {kind: before.get(kind) == made[run.name].get(kind) for kind in kinds}
            wrong += not all(results.values())
            shown = "  ".join(f"{kind} {'equal' if same else 'DIFFERENT'}" for kind, same in results.items())
            print(f"{run.name:26} {seconds:5.1f} s  {shown}", flush=True)
    if given.record:
        # Digests of other facts than the recorded ones would not belong together.
        kept = recorded["runs"] if recorded["facts"] == facts() else {}
        runs = {**kept, **made}
        ordered = {name: runs[name] for name in BY_NAME if name in runs}
        FILE.write_text(json.dumps({"facts": facts(), "runs": ordered}, indent=1) + "\n")
    print(f"{len(chosen)} runs, {wrong} {'failed' if given.record else 'different or failed'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
