"""``eggroll runs``: a table that nothing in the folder can break."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from eggroll.cli import runs as command
from eggroll.cli.main import main
from eggroll.errors import ConfigError
from eggroll.run import RunDir
from eggroll.run.listing import COLUMNS, Folder, chosen, row_of
from eggroll.run.lock import holder, locked
from eggroll.run.terminal import Terminal

HOUR = 3600.0
CONTENTS = ["[" * 9999, '{"generation": 1' + "0" * 400 + "}", "\x00", '{"generations": {}}\n{']
HOLDER = """
import sys
from eggroll.run.lock import locked
with locked(sys.argv[1], ["eggroll", "tune", "tiny"]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def started(ago):
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - ago))


def made(path, scores, *, total=4, ago=HOUR, kind="tune", result=None, bits=False, **options):
    run = RunDir.create(
        path, {"kind": kind, "options": {"generations": total, **options}}, command=["eggroll"],
        extra={"started_utc": started(ago)},
    )  # fmt: skip
    for generation, score in enumerate(scores):
        more = {"validation_bits_per_byte": -score} if bits else {}
        run.append_metrics({"generation": generation, "heldout_reward": score, **more})
    if result is not None:
        run.write_file("result.json", result)
    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Runs of all kinds, a model that is none, and files that are no runs."""
    path = tmp_path / "runs"
    made(path / "done", [0.1, 0.3, 0.9, 0.5, 0.7], model="smollm2-135m", task="one_sentence")
    made(path / "half", [0.1, 0.2], ago=60, model="smollm2-135m", reward="score.py", total=10)
    made(path / "ended", [5.0, 9.0], kind="rl", env="CartPole-v1", result=b'{"generations": 1}', ago=2 * HOUR)
    made(path / "text", [-8.0, -5.0, -6.0], kind="pretrain", data="book.txt", total=2, bits=True, ago=9 * HOUR)
    made(path / "new", [], ago=5)
    made(path / "broken", [0.0], ago=1.5 * HOUR)
    (path / "broken" / "metrics.jsonl").write_text('{"generation": 0}\nnot JSON\n{"generation": 1}\n')
    (path / "model").mkdir()
    (path / "model" / "config.json").write_text("{}")
    (path / "notes.txt").write_text("nothing")
    monkeypatch.chdir(tmp_path)
    return path


def printed(capsys, *words):
    assert main(["runs", *words]) == 0
    return capsys.readouterr().out.splitlines()


def names(capsys, *words):
    return [line.split()[0] for line in printed(capsys, *words)[1:] if not line.startswith("broken: ")]


def test_the_table_of_a_folder(folder, capsys):
    lines = printed(capsys)
    assert lines[0].split() == list(COLUMNS)
    by_name = {line.split()[0]: line.split() for line in lines[1:7]}
    assert list(by_name) == ["new", "half", "done", "broken", "ended", "text"]
    assert by_name["done"][:-1] == [
        *("done", "tune", "smollm2-135m", "one_sentence", "4/4", "0.9000", "0.7000", "finished", "1h")
    ]
    assert by_name["half"][1:8] == ["tune", "smollm2-135m", "score.py", "1/10", "0.2000", "0.2000", "stopped"]
    assert by_name["ended"][1:7] == ["rl", "CartPole-v1", "1/4", "9.000", "9.000", "ended"]
    assert by_name["text"][1:9] == ["pretrain", "book.txt", "2/2", "5.000", "bits", "6.000", "bits", "finished"]
    assert by_name["new"][1:4] == ["tune", "0/4", "stopped"]
    assert by_name["broken"][1:3] == ["tune", "broken"]
    assert lines[7].startswith("broken: broken: ")
    assert lines[7].endswith("remove that line to go on without it")
    assert "line 2 is not a JSON object: 'not JSON'" in lines[7]


def test_a_pipe_gets_plain_text_however_long_the_lines_are(folder, tmp_path):
    made(folder / ("long" * 30), [0.5], model="m" * 90)
    line = [sys.executable, "-m", "eggroll.cli.main", "runs"]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "40"})
    assert "long" * 30 in done.stdout
    assert "m" * 90 in done.stdout
    assert "\x1b" not in done.stdout
    assert all(" " not in line[-1:] for line in done.stdout.splitlines())


def test_it_sorts(folder, capsys):
    assert names(capsys, "--sort", "best") == ["ended", "done", "half", "text", "broken", "new"]
    assert names(capsys, "-s", "last", "--reverse")[-3:] == ["half", "done", "ended"]
    assert names(capsys, "-s", "generations") == ["done", "text", "ended", "half", "broken", "new"]
    assert names(capsys, "-s", "name") == ["broken", "done", "ended", "half", "new", "text"]
    assert names(capsys, "-s", "state", "-f", "kind=tune")[-2:] == ["half", "new"]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["smollm2"], {"done", "half"}),
        (["kind=tune", "state=stopped"], {"half", "new"}),
        (["best>0.5"], {"done", "ended", "text"}),
        (["best < 0.5"], {"half"}),
        (["age<30m"], {"half", "new"}),
        (["age > 1.5h", "kind=rl"], {"ended"}),
        (["generations>1"], {"done", "text"}),
        (["last>5.5", "name=text"], {"text"}),
        (["nothing of that kind"], set()),
    ],
)
def test_it_filters(folder, conditions, expected):
    found = chosen(Folder(folder).rows(), sort="name", conditions=conditions)
    assert {row.name for row in found} == expected


def test_nothing_that_fulfils_the_conditions(folder, capsys):
    assert printed(capsys, "-f", "kind=none") == ["no run fulfils the conditions"]


def test_wrong_use_is_told(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, text in (
        (["--sort", "size"], f"error: --sort 'size' must be one of: {', '.join(COLUMNS)}"),
        (["-f", "kind>3"], "error: --filter 'kind>3': > and < are for numbers: generations, best, last, and age"),
        (["-f", "best>much"], "error: --filter 'best>much': > and < are for numbers"),
        (["gone"], "error: gone does not exist. Give the folder that runs are in; commands put theirs in runs/"),
        (["empty"], "error: there is no run in empty. Give the folder that runs are in"),
        (["runs/notes.txt"], "error: runs/notes.txt cannot be read: Not a directory"),
    ):
        assert main(["runs", *words]) == 1
        assert capsys.readouterr().err.startswith(text)


def test_a_run_is_a_folder_of_one(folder, capsys):
    assert names(capsys, "runs/done") == ["done"]


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "result.json"])
@pytest.mark.parametrize(
    "content", ["[" * 9999, '{"generation": 1' + "0" * 400 + "}", "\x00", '{"generations": {}}\n{']
)
def test_no_file_breaks_the_table(folder, name, content):
    (folder / "half" / name).write_text(content)
    rows = {row.name: row for row in Folder(folder).rows()}
    assert rows["done"].state == "finished"
    assert rows["half"].state in ("broken", "stopped", "finished", "ended")
    assert len(rows["half"].trouble) < 1000
    assert len(rows["half"].cells(0.0)) == len(COLUMNS)


def test_pipes_and_links_are_not_waited_for(folder):
    (folder / "half" / "metrics.jsonl").unlink()
    os.mkfifo(folder / "half" / "metrics.jsonl")
    (folder / "new" / ".lock").symlink_to("/dev/zero")
    rows = {row.name: row for row in Folder(folder).rows()}
    assert "is a named pipe, where a file belongs" in rows["half"].trouble
    assert rows["new"].state == "stopped"


def test_names_from_a_folder_do_not_steer_the_terminal(folder, capsys):
    made(folder / "\x1b[31mred", [0.5], model="\x1b]0;title\x07[bold]x\ny")
    text = "\n".join(printed(capsys))
    assert "\x1b" not in text
    assert "[bold]x y" in text


def test_a_run_that_goes_on_is_running(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder / "half"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    assert row_of(folder / "half").state == "running"
    assert holder(folder / "half")["pid"] == process.pid
    process.kill()  # its lock file stays
    process.communicate()
    assert (folder / "half" / ".lock").exists()
    assert row_of(folder / "half").state == "stopped"


def test_to_look_at_a_run_does_not_free_its_lock(folder):
    with locked(folder / "half"):
        assert row_of(folder / "half").state == "running"
        done = subprocess.run(
            [sys.executable, "-c", HOLDER, folder / "half"], capture_output=True, text=True, check=False
        )
    assert "is in use: process" in done.stderr


def test_what_has_not_changed_is_read_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr("eggroll.run.listing.row_of", lambda path: read.append(path.name) or row_of(path))
    looked = Folder(folder)
    looked.rows()
    read.clear()
    RunDir.open(folder / "half").append_metrics({"generation": 2, "heldout_reward": 0.4})
    rows = {row.name: row for row in looked.rows()}
    assert read == ["half"]
    assert (rows["half"].generations, rows["half"].last) == (2, 0.4)


def rounds(monkeypatch, *steps):
    """Between two looks, one step after the other happens; then Ctrl-C."""
    left = list(steps)

    def sleep(seconds):
        assert seconds == command.EVERY_S
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr("eggroll.cli.runs.time.sleep", sleep)


def test_watch_follows_a_run(folder, monkeypatch, capsys):
    run = RunDir.open(folder / "half")
    rounds(
        monkeypatch,
        lambda: None,
        lambda: run.append_metrics({"generation": 2, "heldout_reward": 0.25}),
        lambda: [path.unlink() for path in (folder / "half").iterdir() if path.is_file()],
    )
    text = "\n".join(printed(capsys, "--watch", "-f", "name=half"))
    assert text.count("half") == 2, "it is printed again only when something has changed"
    assert "1/10" in text
    assert "2/10" in text
    assert text.endswith("no run fulfils the conditions")


def test_watch_on_a_terminal(folder, monkeypatch):
    rounds(monkeypatch, lambda: RunDir.open(folder / "half").append_metrics({"generation": 3, "heldout_reward": 0.33}))
    console = Terminal(force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr("eggroll.cli.runs.Terminal", lambda **_: console)
    with console.capture() as captured:
        assert command.run(command.RunsOptions(watch=True)) == 0
    assert "3/10" in captured.get()
    assert isinstance(console, Console)


def test_a_narrow_terminal_has_fewer_columns_and_whole_names(folder):
    for width, missing in ((120, set()), (84, {"kind"}), (64, {"kind", "age", "last"})):
        console = Terminal(force_terminal=True, width=width, highlight=False)
        found = chosen(Folder(folder).rows(), sort="name", conditions=["smollm2"])
        with console.capture() as captured:
            console.print(command.table(console, found))
        plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
        assert set(COLUMNS) - set(plain.split()) == missing
        assert "smollm2-135m" in plain


def test_an_unknown_column_is_no_condition(folder):
    with pytest.raises(ConfigError, match="must be one of"):
        chosen([], sort="")
    assert [row.name for row in chosen(Folder(folder).rows(), sort="name", conditions=["size=3"])] == []
