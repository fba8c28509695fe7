"""The steps before the first generation: a line that moves on a terminal, a few plain ones elsewhere."""

import io

from eggroll.run.steps import Steps
from eggroll.run.terminal import Terminal


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def take(steps, clock):
    for number, seconds in enumerate((0, 6, 6, 6)):
        clock.now += seconds  # the first step is when the time begins
        steps(f"step {number}", f"found {number}" if number else "")
    steps("", "found the last")


def test_a_few_plain_lines_where_there_is_no_terminal():
    clock, file = Clock(), io.StringIO()
    steps = Steps(Terminal(file=file), clock)
    clock.now = 1000.0
    take(steps, clock)
    assert file.getvalue() == "  found 1 (6s)\n  found 3 (18s)\n"


def test_a_terminal_shows_each_step_and_what_it_found():
    clock, file = Clock(), io.StringIO()
    steps = Steps(Terminal(file=file, force_terminal=True, width=60, height=20, _environ={"TERM": "xterm"}), clock)
    take(steps, clock)
    shown = file.getvalue()
    for number in range(4):
        assert f"step {number}" in shown
    assert "found the last" in shown
    assert "12s" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is there again
    steps.close()
    assert file.getvalue() == shown
