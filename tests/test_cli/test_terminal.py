"""Text from elsewhere (models, rewards, run directories) is shown and never steers the terminal."""

import ast
import io
import json
import re
from pathlib import Path

import pytest
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import eggroll as package
from eggroll.run.console import Display
from eggroll.run.terminal import Terminal, printable

EVIL = "\x1b[2Jgone\x1b]0;title\x07\x9b31m"
SHOWN = "�[2Jgone�]0;title��31m"
STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_printable():
    assert printable(EVIL) == SHOWN
    assert printable("a\r\nb\tc\n") == "a\nb\tc\n"
    assert printable("over\rwritten \u202egpj.exe\u2029") == "over�written �gpj.exe�"
    for text in ("naïve 猫\u3000猫", "👩\u200d🔬", "می\u200cخواهم", "a\u00a0b", "\ud83d"):
        assert printable(text) == text


def terminal(**settings):
    return Terminal(file=io.StringIO(), width=60, **settings)


@pytest.mark.parametrize(
    "put",
    [
        lambda text: f"[bold]x[/] {text}",
        Text,
        lambda text: Panel(Text(text), title=Text(text)),
        lambda text: Panel(text, title=text),
    ],
)
def test_whatever_is_printed(put):
    console = terminal()
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(put(EVIL))
    console.print(put(EVIL), table, EVIL)
    console.print(EVIL, markup=False, soft_wrap=True)
    out = console.file.getvalue()
    assert not STEERS.search(out)
    assert out.count("gone") >= 4


def test_the_live_display_keeps_its_own_sequences():
    console = terminal(force_terminal=True, legacy_windows=False)
    with Live(Text(EVIL), console=console, refresh_per_second=1):
        console.print(EVIL)
    with Display(3, title=EVIL, console=console) as display:
        display.message(EVIL)
        display.generation({"generation": 1, "fitness_mean": 1.0})
    out = console.file.getvalue()
    assert "\x1b[2J" not in out
    assert "]0;" in out
    assert "\x1b]0;" not in out
    assert "\x1b[?25l" in out  # hides the cursor


def test_a_reward_that_raises_and_a_run_whose_names_hold_sequences(eggroll):
    (eggroll.work / "bad.py").write_text(f"def score(text):\n    raise ValueError({EVIL!r} + text)\n")
    done = eggroll.tune("-r", "bad.py", "-g", "1", "-o", f"run\x1b]0;{1}")
    assert done.status == 1
    assert "ValueError: �[2Jgone" in done.err
    assert not STEERS.search(done.out + done.err)


def test_keys_and_values_of_a_config(eggroll):
    assert eggroll.tune("-g", "1", "-o", "run").status == 0
    path = eggroll.work / "run/config.json"
    config = json.loads(path.read_text())
    del config["check"]  # as in older runs: a changed file is refused otherwise
    path.write_text(json.dumps({**config, "options": {**config["options"], EVIL: 1}}))
    for command in (("tune", "--resume", "run"), ("replay", "run")):
        done = eggroll(*command)
        assert done.status == 1
        assert "gone" in done.err
        assert not STEERS.search(done.out + done.err)
    path.write_text(json.dumps({**config, "options": {**config["options"], "model": EVIL}}))
    for command in (("tune", "--resume", "run"), ("replay", "run"), ("tune", "--resume", "run", "--help")):
        done = eggroll(*command)
        assert not STEERS.search(re.sub(r"\x1b\[[\d;]*m", "", done.out + done.err))


def test_commands_print_to_a_terminal_of_ours():
    """No command makes a console of its own that would let text through."""
    found = []
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "Console":
                found.append(f"{path}:{node.lineno}")
    assert not found


def test_a_large_run_says_what_it_takes(eggroll, monkeypatch):
    monkeypatch.setattr("eggroll.cli.watch.SAID_FROM", 100_000)
    monkeypatch.setattr("eggroll.run.disk.LARGE", 100_000)
    done = eggroll.tune("-g", "2", "--checkpoint-every", "1", "-o", "run")
    assert re.search(
        r"^disk     \d+\.\d MB, \d+ kB of it checkpoints, from which the run can be continued$", done.out, re.M
    )
    assert [path.name for path in (eggroll.work / "run/checkpoints").iterdir()] == ["generation-000002"]
    assert eggroll("tune", "--resume", "run", "-g", "3", "--report-to", "none").status == 0
