"""Draw the pictures of the documentation that show a terminal and the documentation itself.

    python scripts/pictures.py terminal runs/demo   docs/images/terminal.svg, from the directory of a finished run
    python scripts/pictures.py site                 docs/images/docs.png, from build/site (`make docs`; needs Chromium)

The terminal's lines are written by the program's own code: the live display is given what the run has recorded, on a
clock that shows the recorded times; what is printed at the end is what `eggroll tune` prints.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eggroll.run.console import Display
from eggroll.run.keeping import Kept, Standing
from eggroll.run.run_dir import RunDir
from eggroll.run.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS = 108
WINDOW = (1280, 900)
"""Pixels of the browser's window."""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def terminal(folder: Path, at: int) -> Path:
    """A finished run of ``eggroll tune``: its display after generation ``at``, and what is printed at its end."""
    from eggroll.cli.tune import _show

    console = screen(record=True)
    run = RunDir.open(folder)
    options, metrics = run.config["options"], run.metrics()
    typed = [word for word in run.environment["command"][:-2] if word != "--seed"]  # without where it was written to
    typed = [word for word in typed if word != str(options["seed"])]
    console.print(f"[bold green]$[/] {' '.join(typed)} -o {folder}")
    console.print(f"[dim]  ... after generation {at}:[/]")
    console.print(frame(run, metrics, at))
    console.print("[dim]  ... at the end:[/]", end="")
    standing = Standing.of(metrics)
    result = json.loads((run.path / "result.json").read_text())
    kept = Kept(result["saved"], result["saved_generation"], result["generations"], standing)
    plan = SimpleNamespace(options=SimpleNamespace(push_to_hub=False))
    trained: Any = SimpleNamespace(run=run, kept=kept, generation=kept.generations, plan=plan, interrupted=False)
    _show(console, trained)
    text = console.export_svg(title=f"eggroll tune {options['model']} --task {options['task']}")
    path = IMAGES / "terminal.svg"
    # A picture loads nothing from elsewhere; the reader's own fixed-width font is taken.
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL), encoding="utf-8")
    return path


def screen(*, record: bool = False) -> Terminal:
    """A terminal of the picture's size, which shows nothing."""
    return Terminal(
        record=record, file=io.StringIO(), force_terminal=True, width=COLUMNS, height=40, highlight=False,
        color_system="truecolor", legacy_windows=False, _environ={"TERM": "xterm-256color"},
    )  # fmt: skip


def frame(run: RunDir, metrics: list[dict[str, Any]], at: int) -> Any:
    """What the live display showed after generation ``at``."""
    clock = SimpleNamespace(now=0.0)
    display = Display(
        run.config["options"]["generations"], title="smollm2-135m on one_sentence", console=screen(),
        clock=lambda: clock.now,
    )  # fmt: skip
    samples = run.samples()
    for line in metrics:
        if line["generation"] > at:
            break
        clock.now = line.get("elapsed_s", 0.0)
        display.samples([row for row in samples if row["generation"] == line["generation"]])
        display.generation(line)
    return display._render()


def site() -> Path:
    """The first page of the documentation, as a browser shows it."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise SystemExit(f"none of these is installed: {', '.join(BROWSERS)}")
    page, path = ROOT / "build" / "site" / "index.html", IMAGES / "docs.png"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={profile}", f"--window-size={WINDOW[0]},{WINDOW[1]}", "--virtual-time-budget=5000",
             f"--screenshot={path}", page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    return path


def main() -> int:
    """Draw one of the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("terminal", "site"))
    parser.add_argument("run", nargs="?", type=Path, help="directory of a finished run of eggroll tune --task")
    parser.add_argument("--at", type=int, default=20, help="the generation whose display is shown")
    given = parser.parse_args()
    if given.what == "terminal" and given.run is None:
        parser.error("terminal needs the directory of a run")
    path = site() if given.what == "site" else terminal(given.run, given.at)
    print(f"{os.path.relpath(path)}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
