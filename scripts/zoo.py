"""Is every member right? PyTorch's modules, transformers' architectures and timm's models against the oracle.

    python scripts/zoo.py                        run what has no result yet, then write docs/models.md
    python scripts/zoo.py --only 'transformers/.*moe' --again
    python scripts/zoo.py --list                 names of the cases, without running anything
    python scripts/zoo.py --fast                 the cases that the tests run
    python scripts/zoo.py --table                only write docs/models.md from the results

The members of a case are made by ``eggroll.core.oracle`` alone, put as plain weights into the plain module and run one
by one. ``Population.forward(mode="auto")``, ``Population.perturbed`` and greedy generation must come to the same. Every
case has a time limit, in a process that is started again after a hang or a crash. Results are one JSON line a case in
``benchmarks/results/zoo.jsonl``; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.jsonl"
FAMILIES = ("made", "torch", "transformers", "timm")
CLOCK = 10
IMPORTS = 60.0
Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Compare members of a population with the same members alone, for many modules."""

    only: str = ""
    """Regular expression: run the cases whose name it finds."""
    family: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FAMILY ...")] = FAMILIES
    """Collections: made (by hand), torch, transformers, timm."""
    fast: bool = False
    """Run the small selection that the tests run."""
    list: bool = False
    """Print the names of the cases and stop."""
    table: bool = False
    """Write docs/models.md from the results and stop."""
    again: bool = False
    """Also run cases that have a result."""
    processes: int = 2
    """Processes, of one thread each."""
    limit: float = 60.0
    """Seconds of processor time that a case may take; by the clock, ten times as much."""
    results: Path = RESULTS
    """File of the results, one JSON line a case."""


def main(options: Options) -> int:
    """Run, report, write the table; 1 if a case is wrong or crashed."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from zoo_cases.table import write_page

    if options.table:
        print(write_page(read(options.results)))
        return 0
    names = chosen(options)
    if options.list:
        print("\n".join(names))
        return 0
    known = {} if options.again else {result["case"]: result for result in read(options.results)}
    todo = [name for name in names if name not in known]
    print(f"{len(names)} cases, {len(todo)} to run, {options.processes} processes")
    start = time.monotonic()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    found: list[Result] = [known[name] for name in names if name in known]
    with options.results.open("a", encoding="utf-8") as file:
        for result in run(todo, options.processes, options.limit):
            found.append(result)
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
            print(f"[{len(found)}/{len(names)} {time.monotonic() - start:5.0f} s] {line(result)}", flush=True)
    compact(options.results)
    print(", ".join(f"{count} {status}" for status, count in Counter(map(overall, found)).most_common()))
    if options.results == RESULTS:
        print(write_page(read(options.results)))
    return int(any(overall(result) in ("wrong", "crashed") for result in found))


def chosen(options: Options) -> list[str]:
    """Names of the cases that the options ask for."""
    from zoo_cases import all_cases
    from zoo_cases.fast import FAST

    cases = all_cases(options.family, lambda sentence: print(sentence, file=sys.stderr))
    names = [name for name in cases if re.search(options.only, name)]
    return [name for name in names if name in FAST] if options.fast else names


def overall(result: Result) -> str:
    """A result in one word."""
    return result.get("overall", result["status"])


def line(result: Result) -> str:
    """A result on one line."""
    mode = result.get("mode", "")
    words = [result["case"], overall(result), mode, f"{result['slowdown']}x" if "slowdown" in result else ""]
    for part in (result, result.get("block", {}), result.get("generation", {})):
        if part.get("status") in ("wrong", "crashed", "no case"):
            words.append(f"({part['status']}: {part.get('sentence', '')[:120]})")
    return " ".join(word for word in words if word)


def read(path: Path) -> list[Result]:
    """All results of a file, the last one of each case; a line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    found: dict[str, Result] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            result = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[result["case"]] = result
    return list(found.values())


def compact(path: Path) -> None:
    """One line a case, sorted, so that two files can be compared."""
    results = sorted(read(path), key=lambda result: natural(result["case"]))
    text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def natural(name: str) -> list[Any]:
    """A sorting key that puts 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def run(names: Iterable[str], processes: int, limit: float) -> Iterator[Result]:
    """Results as they come. A process that hangs or dies costs the case that it was at, and is replaced."""
    waiting = list(reversed(list(names)))
    busy: dict[Connection, Worker] = {}
    while waiting or busy:
        while waiting and len(busy) < processes:
            worker = Worker()
            worker.give(waiting.pop())
            busy[worker.pipe] = worker
        for pipe in wait(list(busy), timeout=1.0):
            worker = busy[pipe]  # type: ignore[index]
            try:
                yield pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                yield worker.lost(f"the process ended with code {worker.end()}")
                del busy[worker.pipe]
                continue
            if waiting:
                worker.give(waiting.pop())
            else:
                worker.end()
                del busy[worker.pipe]
        for worker in [w for w in busy.values() if w.is_late(limit)]:
            worker.end()
            del busy[worker.pipe]
            yield worker.lost(f"not done after {limit:g} s of processor time, or {CLOCK * limit:g} s by the clock")


class Worker:
    """A process that runs cases one after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.name, self.since, self.used = "", 0.0, 0.0

    def give(self, name: str) -> None:
        """Start a case."""
        # The first case has the imports' time on top.
        self.used = self.processor_time() + (0.0 if self.name else IMPORTS)
        self.name, self.since = name, time.monotonic()
        self.pipe.send(name)

    def processor_time(self) -> float:
        """Seconds of processor time that the process has used so far."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    def is_late(self, limit: float) -> bool:
        """Whether the case takes longer than it may. A busy machine must not look like a case that hangs."""
        if time.monotonic() - self.since > CLOCK * limit:
            return True
        return self.processor_time() - self.used > limit

    def end(self) -> int | None:
        """Stop the process; its exit code if it had ended by itself."""
        self.process.join(timeout=0.2)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return code

    def lost(self, why: str) -> Result:
        """The result of the case that the process was at."""
        return {"case": self.name, "status": "crashed", "sentence": why}


def work(pipe: Connection) -> None:
    """A worker's life: names in, results out."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT / "scripts"))
    import torch
    from zoo_cases import all_cases
    from zoo_cases.check import quiet, run_case

    torch.set_num_threads(1)
    cases: dict[str, Any] = {}
    with quiet():
        while True:
            try:
                name = pipe.recv()
            except EOFError:
                return
            try:
                if name not in cases:
                    cases.update(all_cases([name.split("/")[0]], lambda _: None))
                result = run_case(cases[name])
            except Exception as error:
                result = {"case": name, "status": "crashed", "sentence": f"zoo: {type(error).__name__}: {error}"[:600]}
            pipe.send(result)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
