"""The display: what a person needs to see, on a terminal and in a log file."""

from __future__ import annotations

import io
import os
import sys

import pytest
from rich.console import Console

from eggroll._streams import forgive
from eggroll.run.console import Display, duration, number, rate, sparkline

START = {"generation": 0, "event": "start", "heldout_reward": -2.5}
LINE = {
    "generation": 1,
    "fitness_mean": -1.25,
    "fitness_max": 0.5,
    "fitness_min": -4.0,
    "fitness_std": 0.3,
    "members_per_s": 3.92,
    "tokens_per_s": 1234.0,
    "invalid_scores": 0,
}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def file():
    return io.StringIO()


@pytest.fixture
def display(file, clock):
    return Display(10, title="tiny", console=Console(file=file, width=60), clock=clock)


def on_terminal(file, clock, width=100, total=10, **options):
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    return Display(total, title="tiny", console=console, clock=clock, **options)


def last_frame(file):
    return file.getvalue().split("tiny")[-1]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
@pytest.mark.parametrize("terminal", [False, True])
def test_no_character_ends_a_run(encoding, terminal):
    """Neither in the title, nor in a message, nor of our own; half an emoji is in no encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=100, force_terminal=terminal)
    with Display(2, title="tüny → x", console=console) as display:
        display.generation(START)
        display.message("an arrow →, half an emoji \ud83d, 猫")
        display.generation(LINE)
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert ("an arrow →, half an emoji ?, 猫" if encoding == "utf-8" else "an arrow ?, half an emoji ?, ?") in shown


def test_streams_that_forgive_already_stay_as_they_are():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    forgive(stream, io.StringIO(), None, object())
    assert stream.errors == "backslashreplace"


def test_without_a_terminal_one_plain_line_per_generation(display, file, clock):
    with display:
        display.generation(START)
        clock.now += 8
        display.generation(LINE)
        clock.now += 8
        display.generation({**LINE, "generation": 2, "heldout_reward": -2.0, "invalid_scores": 3})
        clock.now += 8
        display.generation({**LINE, "generation": 3, "heldout_reward": -2.25})
    fitness = "fitness mean -1.250 max 0.5000 std 0.3000"
    speed = "3.9 members/s | 1.2k tokens/s"
    assert file.getvalue().splitlines() == [
        "tiny: generation 0 of 10",
        "generation  0/10 | held-out -2.500 (best -2.500, start -2.500)",
        f"generation  1/10 | {fitness} | {speed} | 1m 12s left",
        f"generation  2/10 | {fitness} | held-out -2.000 (best -2.000, start -2.500) | {speed} "
        "| 3 invalid scores | 1m 04s left",
        f"generation  3/10 | {fitness} | held-out -2.250 (best -2.000, start -2.500) | {speed} | 56s left",
    ]


def test_plain_lines_have_no_escape_codes_and_are_ascii(display, file):
    with display:
        display.generation(LINE)
    assert file.getvalue().isascii()
    assert "\x1b" not in file.getvalue()


def test_missing_and_null_values_are_left_out(display, file):
    with display:
        display.generation({"generation": 1, "fitness_mean": None, "heldout_reward": None, "tokens_per_s": None})
    assert file.getvalue().splitlines()[1].startswith("generation  1/10 | 0s left")


def test_generations_that_take_no_time_share_a_line(display, file, clock):
    with display:
        display.generation(START)
        for generation in range(1, 9):
            clock.now += 1
            heldout = {"heldout_reward": -2.0} if generation == 4 else {}
            display.generation({"generation": generation, "fitness_mean": float(generation), **heldout})
    assert file.getvalue().splitlines() == [
        "tiny: generation 0 of 10",
        "generation  0/10 | held-out -2.500 (best -2.500, start -2.500)",
        "generation  5/10 | fitness mean 5.000 | held-out -2.000 (best -2.000, start -2.500) | 5s left",
        "generation  8/10 | fitness mean 8.000 | 2s left",  # where the run was ended
    ]


def test_the_last_generation_is_always_said(display, file, clock):
    with display:
        for generation in range(1, 11):
            clock.now += 0.1
            display.generation({"generation": generation})
    assert [line.split(" | ")[0] for line in file.getvalue().splitlines()[1:]] == [
        "generation  1/10",
        "generation 10/10",
    ]


CTRL_C = """
import sys
from eggroll.run.console import Display
with Display(3, title="tiny") as display:
    display.generation({"generation": 1, "fitness_mean": 1.0})
    try:
        print("ready", file=sys.stderr)
        input()
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_ctrl_c_does_not_shift_the_live_display():
    """The terminal's own ``^C`` would push the panel down by a line, and its upper border would be there twice."""
    import pty
    import termios

    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm", COLUMNS="80")
        os.execv(sys.executable, [sys.executable, "-c", CTRL_C])
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1024)
    assert not termios.tcgetattr(terminal)[3] & termios.ECHOCTL
    os.write(terminal, b"\x03")
    while True:
        try:
            piece = os.read(terminal, 1024)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        shown += piece
    assert os.waitpid(child, 0)[1] == 0
    assert b"fitness" in shown
    assert b"^C" not in shown


def test_the_last_generation_has_no_time_left(display, file):
    with display:
        display.generation({"generation": 10})
    assert file.getvalue().splitlines()[1] == "generation 10/10"


def test_a_message_is_printed_as_it_is_in_one_line(display, file):
    text = "checkpoint [bold]saved[/bold] to " + "a" * 100
    with display:
        display.message(text)
    assert file.getvalue().splitlines()[1] == text


def test_the_time_left_follows_the_last_generations_and_not_a_pause_before(display, clock):
    clock.now += 1000  # between making the display and the loop
    with display:
        assert display.seconds_left() is None
        for generation in range(1, 6):
            clock.now += 4
            display.generation({"generation": generation})
        assert display.seconds_left() == pytest.approx(5 * 4)


def test_a_resumed_run_counts_from_where_it_was(file, clock):
    past = [START, {**LINE, "heldout_reward": -1.0}]
    display = Display(10, start=4, title="tiny", history=past, console=Console(file=file), clock=clock)
    with display:
        clock.now += 5
        display.generation({"generation": 5, "heldout_reward": -1.5})
        assert display.seconds_left() == pytest.approx(25)
    assert file.getvalue().splitlines() == [
        "tiny: generation 4 of 10",
        "generation  5/10 | held-out -1.500 (best -1.000, start -2.500) | 25s left",
    ]


def test_on_a_terminal_it_shows_everything(file, clock):
    with on_terminal(file, clock) as display:
        display.generation(START)
        clock.now += 8
        display.generation(LINE)
        clock.now += 8
        display.generation({**LINE, "generation": 2, "fitness_mean": -1.0, "heldout_reward": -2.0, "invalid_scores": 2})
    frame = last_frame(file)
    for text in (
        "generation 2/10",
        "16s, 1m 04s left",
        "mean -1.000  max 0.5000  spread 0.3000  2 invalid",
        "now  -2.000  best -2.000  start -2.500",
        "3.9 members/s  1.2k tokens/s",
        "▁█",
    ):
        assert text in frame


def test_the_end_and_an_empty_run_are_shown_as_done(file, clock):
    with on_terminal(file, clock, total=0):
        pass
    assert "generation 0/0" in last_frame(file)
    assert "done" in last_frame(file)


@pytest.mark.parametrize("width", [30, 50, 76, 200])
def test_no_line_is_wider_than_the_terminal(file, clock, width):
    with on_terminal(file, clock, width=width) as display:
        display.generation({**START, **LINE})
        display.generation({**LINE, "generation": 2, "fitness_mean": -1.0})
    assert all(len(line) <= width for line in last_frame(file).splitlines()[1:-1])


MEMBERS = [
    {"member": 0, "split": "train", "prompt": "p", "completion": "bad", "reward": 0.25},
    {"member": 1, "split": "train", "prompt": "p", "completion": "good", "reward": 0.75},
    {"member": 2, "split": "train", "prompt": "p", "completion": "broken", "reward": None},
]
HELDOUT = [
    {"member": "center", "split": "heldout", "prompt": "q", "completion": "one\n two", "reward": 0.5},
    {"member": "center", "split": "heldout", "prompt": "r", "completion": "other", "reward": 1.0},
]


def test_a_sample_answer_in_one_line(file, clock):
    with on_terminal(file, clock) as display:
        display.samples([{"member": 0, "reward": 1.0}])  # a reward of the model: nobody writes anything
        display.generation(LINE)
        assert "answer" not in last_frame(file)
        display.samples(MEMBERS)
        display.generation({**LINE, "generation": 2})
        (line,) = (line for line in last_frame(file).splitlines() if "answer" in line)
        assert [word for word in line.split() if word != "│"] == ["answer", "good", "0.7500"]
        display.samples(HELDOUT)
        display.samples(MEMBERS)  # the same held-out prompt stays
        display.generation({**LINE, "generation": 3})
    (line,) = (line for line in last_frame(file).splitlines() if "answer" in line)
    assert [word for word in line.split() if word != "│"] == ["answer", "one", "two", "0.5000"]


@pytest.mark.parametrize("width", [30, 100])
def test_an_answer_is_cut_off_and_steers_no_terminal(file, clock, width):
    with on_terminal(file, clock, width=width) as display:
        display.samples([{"completion": "\x1b[2J[bold]a\x07\u202e" + 1000 * "long ", "reward": float("nan")}])
        display.generation(LINE)
        display.samples([{"completion": "", "reward": 0.0}])
    frames = file.getvalue()
    assert all(len(line) <= width for line in last_frame(file).splitlines()[1:-1])
    assert "\x1b[2J" not in frames
    assert "\x07" not in frames
    assert "\u202e" not in frames
    if width == 100:
        assert "\N{REPLACEMENT CHARACTER}[2J[bold]a" in frames
        assert "(empty)" in last_frame(file)


def test_the_cursor_comes_back_after_an_error(file, clock):
    with pytest.raises(KeyboardInterrupt), on_terminal(file, clock):
        raise KeyboardInterrupt
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


def test_a_dumb_terminal_gets_plain_lines(file, clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with on_terminal(file, clock) as display:
        display.generation(LINE)
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (number, -2.5834, "-2.583"),
        (number, 0.0, "0.000"),
        (number, 1, "1.000"),
        (number, 12345.6, "12346"),
        (number, 9999.9, "10000"),
        (number, 1234.4, "1234"),
        (number, 1e-7, "1.000e-07"),
        (number, float("nan"), "nan"),
        (rate, 0.4231, "0.42"),
        (rate, 7.31, "7.3"),
        (rate, 128.4, "128"),
        (rate, 1234, "1.2k"),
        (rate, 3.4e6, "3.4M"),
        (duration, 42.4, "42s"),
        (duration, 59.7, "1m 00s"),
        (duration, 185, "3m 05s"),
        (duration, 8040, "2h 14m"),
        (duration, 273600, "3d 04h"),
    ],
)
def test_numbers_for_people(function, value, text):
    assert function(value) == text


def test_sparklines():
    assert sparkline([1.0]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([float(value) for value in range(1000)], width=24)) == 24
