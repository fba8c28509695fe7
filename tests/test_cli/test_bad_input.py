"""Every command with a list of bad inputs: a status that is not 0, an error in a sentence, and never a traceback.

Nothing here gets as far as a first generation. All lines of a command are one test, which shows every line that failed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import traceback

import pytest

from eggroll.cli.main import explained, main

LONG = "x" * 300  # longer than a file's name may be
HUGE = "9" * 30
BYTES = bytes(range(256)) * 4
TEXTS = {
    "file.txt": "x", "prompts.txt": "a\nb\n", "text.txt": "to be or not to be " * 400, "blank.txt": "\n \n",
    "bad.jsonl": '{"prompt": "a"}\n{"prompt"', "list.jsonl": "[1, 2]\n", "number.json": "5", "null.json": "null",
    "object.json": '{"a": 1}', "nan.jsonl": '{"prompt": NaN}\n', "types.jsonl": '{"prompt": 5}\n',
    "mixed.jsonl": '{"prompt": "a"}\n{"x": 1}\n', "deep.json": "[" * 100_000, "deep.jsonl": "[" * 100_000 + "\n",
    "nul.csv": "prompt\n\0\0\n", "score.py": "def score(text):\n    return float(len(text))\n",
    "syntax.py": "def score(:\n", "raises.py": "raise RuntimeError('no')\n", "exits.py": "raise SystemExit(0)\n",
    "nothing.py": "x = 1\n", "imports.py": "import nowhere\n\ndef score(text):\n    return 1\n",
    "deep.py": "x = " + "(" * 5000,
    "two.py": "def a(text):\n    return 1\n\ndef b(text):\n    return 2\n", "nul.py": "a\0b",
}  # fmt: skip
RAW = {
    "latin.txt": "größer\n".encode("latin-1"), "latin.py": "x = 'größer'\n".encode("latin-1"),
    "half.jsonl": b'{"prompt": "\\ud83d"}\n',
    **{f"empty.{kind}": b"" for kind in ("txt", "jsonl", "json", "csv", "parquet", "py")},
    **{f"binary.{kind}": BYTES for kind in ("jsonl", "csv", "parquet", "py", "zip", "gguf")},
}  # fmt: skip
RUNS = {
    "run-text": b'{"kind"', "run-binary": BYTES, "run-list": b"[]", "run-null": b"null", "run-deep": b"[" * 100_000,
    "run-unknown": b'{"kind": "nothing", "options": {}}',
    "run-wrong": b'{"kind": "tune", "options": {"model": 5, "population_size": "x"}}',
}  # fmt: skip
PATHS = [
    "''",
    "gone",
    "empty",
    "file.txt",
    "file.txt/below",
    LONG,
    "loop",
    "dangling",
    "'a\nb'",
    "'[bold]'",
    "/dev/null",
]
WRITTEN = ["file.txt", "file.txt/below", LONG, "loop/below", "/proc/nothing", "/dev/null/below", "$'\\udcff'"]
TUNE = "tune tiny -p 2 -g 1 --max-tokens 1 --batch-size 1 --report-to none -o new"
REWARD = "-r score.py --prompts prompts.txt"
EVAL = "eval tiny --task zeros --problems 1 --max-tokens 1"
PRETRAIN = "pretrain -p 2 -g 1 --n-layers 1 --hidden 16 --noise-table-size 65536 --report-to none -o new"
RL = "rl -p 2 -g 1 --hidden 2 --layers 1 --report-to none --no-render -o new"
RECIPE = "recipe cartpole -p 2 -g 1 --report-to none -o new"


def numbers(line, *options, wrong=("-1", HUGE, "x")):
    """A command line with wrong numbers for each option: negative, huge, and no number."""
    return [f"{line} {option} {number}" for option in options for number in wrong]


def lines(line, words):
    return [line.format(word) for word in words]


FRACTIONS = ("-1", "nan", "inf", "1e400", "x")
BAD = {
    "none": ["nothing", "''", "'[bold]'", "--nothing", LONG, "'a\nb'", "recipe", "recipe nothing",
        "recipe all --seed x"],
    "tune paths": [
        *lines("tune {} -p 2 -g 1 -o new " + REWARD, [*PATHS, "hollow", "binary.gguf"]),
        *lines(TUNE + " -r score.py --prompts {}", [
            *(path for path in PATHS if path != "file.txt"), "empty.txt", "blank.txt", "latin.txt", "bad.jsonl",
                "list.jsonl",
            "number.json", "null.json", "deep.json", "deep.jsonl", "object.json", "nan.jsonl", "binary.jsonl",
            "empty.jsonl", "empty.json", "empty.csv", "binary.csv", "empty.parquet", "binary.parquet", "types.jsonl",
            "mixed.jsonl", "binary.zip", "a/b/c", "a:b:c", "hollow", "unreadable.txt",
        ]),
        *lines(TUNE + " -r perplexity -d {}", ["gone", "empty", LONG, "latin.txt", "binary.csv", "deep.json"]),
        *lines(TUNE + " -r score.py --prompts prompts.txt --eval-prompts {}", ["gone", "empty", LONG, "bad.jsonl"]),
        *lines(f"tune tiny -p 2 -g 1 {REWARD} --report-to none -o {{}}", WRITTEN[1:]),
    ],
    "tune rewards": [
        *lines(TUNE + " --prompts prompts.txt -r {}", [
            "''", "' '", "gone.py", "empty", "empty.py", "binary.py", "latin.py", "syntax.py", "raises.py", "exits.py",
            "nothing.py", "imports.py", "two.py", "deep.py", "nul.py", "lambda", "'lambda text: ('", "nomodule:score",
            "json:nothing", "json:__doc__", "':'", "'a:b:c'", "perplexit", "reasoning-gym:nothing", LONG, f"{LONG}.py",
            "loop.py", "/dev/null", "'a\nb'",
        ]),
    ],
    "tune settings": [
        *numbers(f"{TUNE} {REWARD}", "-p", "--rank", "-g", "--max-tokens", "--max-length", "--batch-size",
            "--samples-per-prompt",
                 "--elite-k", "--group-size", "--noise-reuse", "--eval-every", "--checkpoint-every", "--seed"),
        *numbers(f"{TUNE} {REWARD}", "--sigma", "--lr", "--temperature", "--weight-decay", "--lr-decay",
            wrong=FRACTIONS),
        *lines(TUNE + " " + REWARD + " {}", [
            "--device gpu", "--device cuda:99", "--device ''", "--dtype int8", "--target-modules",
            "--target-modules nothing",
            "--target-modules '['", "--exclude '*'", "--task nothing", "--shots 2", "--engine-args 5",
                "--engine-args '{{'",
            "--report-to foo", "--fitness-shaping nomodule:f", "--chat maybe", "--nothing", "extra words",
            "--workers -1",
        ]),
    ],
    "eval": [
        "eval", "eval tiny", "eval tiny --task", "eval tiny tiny tiny --task zeros", "eval tiny --task nothing",
        *lines("eval {} --task zeros --problems 1", [*PATHS, "hollow", "binary.gguf"]),
        *numbers(EVAL, "--samples", "--max-tokens", "--max-length", "--seed", "--shots"), *numbers(EVAL,
            "--temperature", wrong=FRACTIONS),
        *lines(EVAL + " -o {}", WRITTEN[1:-1]),
    ],
    "chat": [
        "chat", "chat tiny -q ''", "chat tiny -q a --only before", "chat tiny -q a --only middle",
        "chat tiny -q a more", *lines("chat {} -q a", [*PATHS, *RUNS, "hollow", "binary.gguf"]),
        *numbers("chat tiny -q a", "--max-tokens", "--max-length", "--seed"),
        *numbers("chat tiny -q a", "--temperature", wrong=FRACTIONS), "chat tiny -q a --system $'\\udcff'",
    ],
    "generate": [
        "generate", "generate tiny", "generate tiny prompts.txt --only before",
        *lines("generate {} prompts.txt", [*PATHS, *RUNS, "hollow"]),
        *lines("generate tiny {} -o new", [
            *(path for path in PATHS if path != "file.txt"), "empty.txt", "blank.txt", "latin.txt", "bad.jsonl",
            "object.json", "types.jsonl", "mixed.jsonl", "binary.parquet", "a/b/c", "unreadable.txt",
        ]),
        *lines("generate tiny prompts.txt --max-tokens 1 -o {}", [*WRITTEN[1:-1], "empty", "prompts.txt"]),
        *numbers("generate tiny prompts.txt", "--max-tokens"),
        *numbers("generate tiny prompts.txt", "--batch-size", wrong=("-1", "0", "x")),
    ],
    "info": [
        "info", *lines("info {}", [*PATHS, "hollow", "binary.gguf"]),
        *numbers("info tiny", "-p", "--prompt-tokens", "--max-tokens", "--rank"), "info tiny --target-modules nothing",
    ],
    "pretrain": [
        "pretrain", *lines(PRETRAIN + " --data {}", ["''", "gone", "empty", LONG, "loop", "dangling",
            "file.txt/below", "'a\nb'", "empty.txt", "file.txt", "/dev/null", "unreadable.txt"]),
        *numbers(f"{PRETRAIN} --data text.txt", "-p", "--rank", "--n-layers", "--hidden", "-g", "--group-size",
            "--sigma-shift",
                 "--noise-table-size", "--noise-reuse", "--seed", "--eval-every", "--eval-tokens", "--tokens",
                 "--context",
                 "--momentum-shift", "--sample-length", "--threads"),
        *numbers(f"{PRETRAIN} --data text.txt", "--alpha", "--lr", "--minutes", "--temperature", wrong=FRACTIONS),
        f"{PRETRAIN} --data text.txt --device gpu", f"{PRETRAIN} --data text.txt --precision int4",
    ],
    "rl": [
        *lines(RL + " --env {}", [
            *PATHS, "nothing-v0", "gymnasium/nothing-v0", "gymnasium/", "gymnasium/nomodule:Foo-v0",
                "gymnasium/json:Foo-v0",
            "'?'", "/", "a/b/c",
            "gymnasium/CartPole-v99", "CartPole-v99", "':'", "json:Foo",
        ]),
        *numbers(RL, "-p", "--rank", "-g", "--env-steps", "--episodes", "--max-steps", "--hidden", "--layers",
            "--eval-every",
                 "--eval-episodes", "--members-per-forward", "--devices", "--seed"),
        *numbers(RL, "--sigma", "--lr", "--lr-decay", "--sigma-decay", wrong=FRACTIONS),
        *lines(RL + " {}", ["--algo foo", "--preset foo", "--algo ppo", "--optimizer foo", "--rank-transform maybe",
            "word"]),
    ],
    "recipe": [
        *numbers(RECIPE, "-p", "-g", "--rank", "--episodes", "--seed"), *numbers(RECIPE, "--sigma", "--lr",
            wrong=FRACTIONS),
        *lines("recipe mnist -g 1 -p 2 --data {}", ["gone", "file.txt", "empty", LONG]),
            *lines(RECIPE + " --device {}", ["gpu", "''", "cuda:99"]),
        *numbers("recipe profile", "--population", "--turns"), *numbers("recipe hyperscale", "--memory-gib",
            wrong=FRACTIONS),
    ],
    "runs": [
        line.format(run)
        for line in ("tune --resume {}", "rl --resume {}", "pretrain --resume {}", "pretrain --sample {}",
            "replay {}", "report {}", "recipe cartpole --resume {}")
        for run in [*PATHS, *(run for run in RUNS if line != "report {}" or run not in ("run-unknown", "run-wrong"))]
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(model_dir, tmp_path_factory):
    """Files that are not what they should be, and a tiny model."""
    path = tmp_path_factory.mktemp("bad")
    for name, text in TEXTS.items():
        (path / name).write_text(text, encoding="utf-8")
    for name, content in RAW.items():
        (path / name).write_bytes(content)
    for name, content in RUNS.items():
        (path / name).mkdir()
        (path / name / "config.json").write_bytes(content)
    (path / "tiny").symlink_to(model_dir)
    (path / "loop").symlink_to("loop")
    (path / "loop.py").symlink_to("loop.py")
    (path / "dangling").symlink_to("nowhere")
    (path / "unreadable.txt").symlink_to("/proc/self/mem")  # whoever reads it, root too, is told "Input/output error"
    (path / "empty").mkdir()
    (path / "hollow").mkdir()
    (path / "hollow" / "config.json").write_text("{}")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_sentence(command, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    faults = []
    for line in BAD[command]:
        fault = fault_of(line, capfd)
        if fault:
            faults.append(f"{line.replace(LONG, 'LONG')}\n    {fault.replace(LONG, 'LONG')}")
        if (folder / "new").exists():
            shutil.rmtree(folder / "new")
    assert not faults, f"{len(faults)} of {len(BAD[command])}:\n" + "\n".join(faults)


def fault_of(line, capfd):
    """What is wrong with how a bad command line ends; empty if nothing is."""
    capfd.readouterr()
    try:
        status = main(words_of(line))
    except SystemExit as left:  # how the parser leaves
        status = left.code
    except BaseException:
        return " / ".join(traceback.format_exc().strip().splitlines()[-3:])
    out, err = capfd.readouterr()
    if status not in (1, 2):
        return f"status {status}"
    if "Traceback" in out + err:
        return "a traceback is shown"
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    if status == 1 and (len(errors) != 1 or len(err) < 30):
        return f"{len(errors)} lines with an error: {err[:300]!r}"
    return "" if (out + err).strip() else "nothing is said"


def words_of(line):
    """The words as a shell gives them; a byte that is no text has no other way into a command line."""
    return [os.fsdecode(b"\xff") if word == "$\\udcff" else word for word in shlex.split(line)]


def test_what_is_quoted_is_shown_as_it_is(folder, monkeypatch, capfd):
    """rich has emoji for words between colons, such as those of a reward."""
    monkeypatch.chdir(folder)
    assert main(shlex.split(f"{TUNE} --prompts prompts.txt -r a:b:c")) == 1
    assert "error: the module of the reward 'a:b:c' cannot be imported" in capfd.readouterr().err
    assert main(["report", "run:x:[bold]"]) == 1
    assert "error: run:x:[bold] does not exist" in capfd.readouterr().err


def eggroll(*words, **streams):
    """The command in a process of its own, as a shell starts it."""
    return subprocess.run(
        [sys.executable, "-m", "eggroll.cli.main", *words], check=False, stderr=subprocess.PIPE, text=True, **streams
    )


@pytest.mark.parametrize("words", [["--help"], ["rl", "--help"]])
def test_a_reader_that_has_gone(words):
    """As in ``eggroll ... | head -1``."""
    gone, end = os.pipe()
    os.close(gone)
    done = eggroll(*words, stdout=end)
    os.close(end)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = eggroll("--help", stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_closed_output_and_a_status(tmp_path):
    """Without any output at all, the error is still told and the status is still 1."""
    command = f"{shlex.quote(sys.executable)} -m eggroll.cli.main report gone >&-"
    done = subprocess.run(["sh", "-c", command], check=False, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: gone does not exist")
    assert "Traceback" not in done.stderr


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    """And are not mistaken for trouble with the output."""

    def late(arguments):
        raise TimeoutError("a worker is late")

    monkeypatch.setattr("eggroll.cli.main._main", late)
    with pytest.raises(TimeoutError):
        main(["report"])
    assert explained(ValueError("a fault")) is None
    assert explained(RuntimeError("a fault")) is None
    assert explained(OSError("without a reason")) is None
    assert explained(PermissionError(13, "Permission denied", "a.txt")).startswith("Permission denied: 'a.txt'. ")
    torch_says = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")
    for error in (MemoryError(), torch_says, RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        assert explained(error).startswith("there is not enough memory")
