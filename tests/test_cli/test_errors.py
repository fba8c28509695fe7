"""Bad input: a status that is not 0, one clear text, nothing lost, and never a traceback."""

import json
import os
import subprocess
import sys

import pytest

from eggroll.cli.main import main
from eggroll.llm.tasks import names
from eggroll.run.run_dir import RunDir


def plain(done):
    """The text of a frame, without its lines."""
    return " ".join((done.err + done.out).replace("│", " ").split())


def refused(done, *texts):
    assert done.status == 1
    assert done.err.startswith("error: ")
    for text in texts:
        assert text in done.err
    return True


def test_no_command_and_unknown_command(eggroll):
    done = eggroll()
    assert done.status == 2
    assert done.out.startswith("usage: eggroll COMMAND")
    done = eggroll("tun", "tiny")
    assert done.status == 2
    assert done.err.startswith("eggroll: there is no command 'tun'; did you mean 'tune'?\n\nusage: eggroll COMMAND")
    assert eggroll("xyz").err.startswith("eggroll: there is no command 'xyz'\n")
    assert eggroll("--help").status == 0
    assert eggroll("--version").out == "eggroll 0.1.0\n"


def test_unknown_flag_suggests_the_right_one(eggroll):
    done = eggroll("tune", "tiny", "--populaton", "8")
    assert done.status == 2
    assert "Unrecognized options: --populaton" in done.err + done.out
    assert "--population" in (done.err + done.out).split("Perhaps you meant")[1]


def test_wrong_type_and_wrong_choice(eggroll):
    done = eggroll("tune", "tiny", "--population", "four")
    assert done.status == 2
    assert done.err.startswith("--population takes a whole number or auto, not 'four'\n")
    done = eggroll("tune", "tiny", "--optimizer", "adma")
    assert done.status == 2
    assert "adam" in done.err + done.out


def test_missing_model(eggroll):
    done = eggroll("tune")
    assert done.status == 2
    assert "MODEL" in done.err + done.out


def test_unknown_models(eggroll):
    done = eggroll("tune", "./tin", "-r", "score.py", "--prompts", "prompts.txt")
    assert refused(done, "model directory tin does not exist. Near matches in .: tiny")
    done = eggroll("tune", "no-such-org/no-such-model", "-r", "score.py", "--prompts", "prompts.txt")
    assert refused(
        done,
        "model 'no-such-org/no-such-model' cannot be loaded. Tried: a directory or file of that name (there is none), "
        "an alias (no), the Hugging Face hub (",
        "aliases that need no hub: gemma3-270m, qwen2.5-coder-1.5b, ",
        "give a model's directory or a .gguf file (HF_HUB_OFFLINE is set)",
    )
    (eggroll.work / "hollow").mkdir()
    done = eggroll("tune", "hollow", "-r", "score.py", "--prompts", "prompts.txt")
    assert refused(
        done, "directory hollow holds no model: a model's directory has a config.json. In it there is: nothing"
    )
    assert not (eggroll.work / "runs").exists()


def test_a_damaged_model(eggroll):
    (eggroll.work / "broken").mkdir()
    for file in (eggroll.work / "tiny").iterdir():
        (eggroll.work / "broken" / file.name).write_bytes(file.read_bytes())
    weights = eggroll.work / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = eggroll("tune", "broken", "-r", "score.py", "--prompts", "prompts.txt")
    assert refused(done, "the model in broken cannot be loaded: ")


def test_data_that_is_not_there_or_empty(eggroll):
    (eggroll.work / "empty.txt").write_text("\n\n")
    (eggroll.work / "bad.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "Good\n')
    (eggroll.work / "other.jsonl").write_text('{"sentence": "Hello"}\n')
    tune = ["tune", "tiny", "-r", "score.py"]
    assert refused(
        eggroll(*tune, "--prompts", "prompt.txt"), "data set prompt.txt does not exist. In . there is: prompts.txt"
    )
    assert refused(
        eggroll(*tune, "--prompts", "empty.txt"),
        "data set empty.txt is empty: it has no row with any text. A data set needs at least one example",
    )
    assert refused(eggroll(*tune, "--prompts", "bad.jsonl"), "data set bad.jsonl, line 2: not valid JSON")
    assert refused(
        eggroll(*tune, "--prompts", "other.jsonl"), "row 1 has the columns ['sentence']; it needs one of prompt,"
    )
    assert refused(
        eggroll(*tune, "--prompts", "prompts.txt", "--eval-prompts", "gone.txt"),
        "data set gone.txt does not exist. In . there is: ",
    )
    assert refused(
        eggroll(*tune),
        "--reward score.py needs prompts to answer: give --prompts with a .jsonl or .txt file, a folder or a hub id. "
        "Without it wikitext-2 would be taken, but data set 'Salesforce/wikitext:wikitext-2-raw-v1'",
    )
    assert refused(
        eggroll(*tune, "--prompts", "prompts.txt", "-d", "texts.txt"),
        "--dataset and --prompts mean the same; give one of them",
    )


def test_patterns_that_match_nothing(eggroll):
    assert refused(
        eggroll.tune("--target-modules", "q_poj", "v_proj"),
        "error: target_modules pattern 'q_poj' matches no parameter. Near matches: q_proj",
    )
    assert refused(
        eggroll.tune("--exclude", "lm_haed"), "exclude pattern 'lm_haed' matches no parameter. Near matches: "
    )
    assert refused(eggroll.tune("--target-modules", "q_proj", "--exclude", "self_attn"), "nothing is left to perturb")
    assert not (eggroll.work / "runs").exists()


def test_settings_that_cannot_work_are_all_reported(eggroll):
    assert refused(
        eggroll.tune("-p", "7"),
        "error: eggroll tune: population_size (=7) must be even with --sampling antithetic; use 8 or --sampling "
        "one_sided\n",
    )
    assert refused(
        eggroll.tune("--target-modules"), "target_modules is empty, so nothing would be evolved; leave it out for all"
    )
    assert eggroll.tune("-p", "7", "--sampling", "one_sided", "-g", "1", "-o", "odd").status == 0
    done = eggroll.tune("-p", "7", "--sigma", "-1", "--rank", "0", "--temperature", "-1", "--noise-reuse", "0")
    assert refused(
        done,
        "eggroll tune has 5 problems:",
        "population_size (=7) must be even",
        "sigma (=-1.0) must be above 0",
        "rank (=0) must be a whole",
        "temperature (=-1.0) must be 0 (greedy) or above",
        "noise_reuse (=0) must be a whole number",
    )
    assert refused(eggroll.tune("--device", "cuda:7"), "device (='cuda:7')")


def test_reward_files(eggroll):
    work = eggroll.work
    (work / "none.py").write_text("def evaluate(x):\n    return 1\n")
    (work / "syntax.py").write_text("def score(text):\n    return (\n")
    (work / "raises.py").write_text("import json\nraise KeyError('key')\n")
    (work / "two.py").write_text("def reward_a(text): return 1\ndef reward_b(text): return 2\n")

    def tried(reward):
        return eggroll("tune", "tiny", "-r", reward, "--prompts", "prompts.txt")

    assert refused(tried("scor.py"), "reward file scor.py does not exist. Python files in .: score.py")
    assert refused(
        tried("none.py"),
        "reward file none.py has no reward function; functions in it: evaluate. Define "
        "one of score(text) -> float, reward(prompts, completions, **columns) -> list[float]",
    )
    assert refused(tried("syntax.py"), "reward file syntax.py is not valid Python, line 2: ")
    assert refused(tried("raises.py"), "reward file raises.py raised KeyError at line 2 while it was loaded: 'key'")
    assert refused(
        tried("two.py"), "reward file two.py has several reward functions: reward_a, reward_b. Say which one"
    )
    assert refused(tried("lambda text: ("), "the reward 'lambda text: (' is not a valid lambda")
    assert refused(tried("perplexty"), "unknown reward 'perplexty'. Did you mean perplexity?")
    assert not (work / "runs").exists()


REWARDS = {
    "raises": (
        "def reward(prompts, completions):\n    return [1 / 0]\n",
        "reward function 'reward' raised ZeroDivisionError: division by zero (on a batch of 8 completions; the first "
        "prompt is ",
    ),
    "wrong count": (
        "def reward(prompts, completions):\n    return [1.0, 2.0, 3.0]\n",
        "reward function 'reward' returned 3 scores for 8 completions; it must return one for each",
    ),
    "no list": (
        "def reward(prompts, completions):\n    return 1.0\n",
        "reward function 'reward' returned float 1.0; it must return a list of 8 numbers",
    ),
    "text": (
        "def score(text):\n    return 'good'\n",
        "returned the text 'good'; a score must be a number",
    ),
    "needs labels": (
        "def reward_fn(model, inputs):\n    return model(inputs['pixels'])\n",
        "reward 'reward_fn' raised KeyError: 'pixels'",
    ),
}


@pytest.mark.parametrize("case", REWARDS)
def test_rewards_that_fail(eggroll, case):
    code, text = REWARDS[case]
    (eggroll.work / "mine.py").write_text(code)
    done = eggroll("tune", *eggroll.tune_arguments[1:], "-r", "mine.py", "-g", "3", "-o", "run")
    assert refused(
        done,
        text,
        "The run in run is intact, with 0 finished generations. When the cause is gone, continue "
        "it: eggroll tune tiny --resume run",
    )
    (eggroll.work / "mine.py").write_text(
        "def reward(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    again = eggroll("tune", "--resume", "run")
    assert again.status == 0, again.err
    assert len(RunDir.open("run").updates()) == 3


FAILS_LATER = """
from pathlib import Path
calls = Path("calls")
def reward(prompts, completions):
    done = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (done + 1))
    if done == 3:
        raise ValueError("server gone")
    return [float(sum(map(ord, text)) % 97) for text in completions]
"""


def test_a_reward_that_fails_later_loses_nothing(eggroll):
    (eggroll.work / "later.py").write_text(FAILS_LATER)
    arguments = ["-r", "later.py", "-g", "5", "--checkpoint-every", "2", "--batch-members", "4"]
    done = eggroll("tune", *eggroll.tune_arguments[1:], *arguments, "-o", "run")
    assert refused(
        done,
        "raised ValueError: server gone",
        '/later.py, line 8: raise ValueError("server gone")',
        "The run in run is intact, with 3 finished generations.",
    )
    run = RunDir.open("run")
    assert len(run.updates()) == 3
    assert [line["generation"] for line in run.metrics()] == [1, 2, 3]
    assert eggroll("tune", "tiny", "--resume", "run").status == 0
    (eggroll.work / "calls").write_text("x" * 100)  # never fails
    assert eggroll("tune", *eggroll.tune_arguments[1:], *arguments, "-o", "whole").status == 0
    assert (eggroll.work / "run/updates.jsonl").read_text() == (eggroll.work / "whole/updates.jsonl").read_text()


def test_a_reward_that_quits_ends_the_run_as_an_error(eggroll):
    (eggroll.work / "later.py").write_text(FAILS_LATER.replace('raise ValueError("server gone")', "quit()"))
    done = eggroll(
        "tune", *eggroll.tune_arguments[1:], "-r", "later.py", "-g", "5", "--batch-members", "4", "-o", "run"
    )
    assert refused(
        done,
        "reward function 'reward' ended the program with sys.exit(), exit() or quit(); a reward must return a score",
        "/later.py, line 8: quit()",
        "The run in run is intact, with 3 finished generations. When the cause is gone, continue it: eggroll tune",
    )
    assert RunDir.open("run").latest_checkpoint().generation == 3
    assert eggroll("tune", "tiny", "--resume", "run").status == 0


@pytest.mark.filterwarnings("default::eggroll.core.fitness.NonFiniteFitnessWarning")
def test_nan_counts_as_the_worst_and_is_counted(eggroll):
    (eggroll.work / "nan.py").write_text(
        "def reward(prompts, completions):\n    return [float('nan'), None] + [float(i) for i in range(6)]\n"
    )
    done = eggroll("tune", *eggroll.tune_arguments[1:], "-r", "nan.py", "-g", "2", "-o", "run")
    assert done.status == 0, done.err
    assert "warning: 2 of 8 scores were NaN or infinite; they count as the worst of the generation" in done.out
    assert "| 2 invalid scores" in done.out
    assert [line["invalid_scores"] for line in RunDir.open("run").metrics()] == [2, 2]
    (eggroll.work / "nan.py").write_text("def score(text):\n    return float('nan')\n")


@pytest.mark.parametrize("value", ["None", "float('nan')", "-math.inf", "[None] * len(completions)"])
def test_not_one_valid_score_ends_the_run(eggroll, value):
    """The first generation without any; the held-out score before it may be none."""
    arguments = "prompts, completions" if value.startswith("[") else "text"
    (eggroll.work / "none.py").write_text(f"import math\ndef score({arguments}):\n    return {value}\n")
    arguments = ["-r", "none.py", "-g", "2", "-o", "run", "--eval-prompts", "held.txt"]
    done = eggroll("tune", *eggroll.tune_arguments[1:], *arguments)
    shown = "-inf" if "inf" in value else "None or NaN"
    assert refused(
        done,
        f"generation 1: not one of its 8 scores is a number; the reward returned {shown} for all of them, the first of "
        "them for ",
        "The run in run is intact, with 0 finished generations.",
    )
    run = RunDir.open("run")
    assert run.updates() == []
    assert not (run.path / "model").exists()
    assert not (run.path / "report.html").exists()


def test_a_lambda_that_returns_none(eggroll):
    assert refused(
        eggroll.tune("-r", "lambda text: None", "-g", "2"), "the reward returned None or NaN for all of them"
    )


def test_rewards_that_are_all_the_same(eggroll):
    done = eggroll.tune("-r", "lambda text: 1", "-g", "3", "-o", "run")
    assert done.status == 0, done.err
    assert (
        done.out.count("generation 1 has no spread: all 4 members scored the same, so there is nothing to learn") == 1
    )
    assert done.out.count("has no spread") == 1
    assert (
        "3 of 3 generations had no spread: all their members scored the same, so nothing was learned from them. Unless "
        "that was the best score there is, try a reward with more steps (some points for a part of the task), a larger "
        "sigma, more prompts per generation, or a temperature above 0\n"
    ) in done.out
    assert "no spread" not in eggroll.tune("-g", "2", "-o", "other").out


def test_an_existing_run_is_not_overwritten(eggroll):
    assert eggroll.tune("-g", "1", "-o", "run").status == 0
    before = (eggroll.work / "run/updates.jsonl").read_bytes()
    done = eggroll.tune("-g", "2", "-o", "run")
    assert refused(
        done,
        "run already holds a run (config.json is there). Continue it with --resume, or choose another "
        "directory with -o",
    )
    assert (eggroll.work / "run/updates.jsonl").read_bytes() == before


def test_a_directory_that_cannot_be_made(eggroll):
    (eggroll.work / "file").write_text("")
    assert refused(eggroll.tune("-g", "1", "-o", "file/run"), "file/run could not be written: Not a directory")


def test_truncated_checkpoints(eggroll):
    arguments = ["-g", "4", "--checkpoint-every", "2", "-o", "run"]
    assert eggroll.tune(*arguments).status == 0
    run = RunDir.open("run")
    (newest,) = (run.checkpoints / "generation-000004").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:5000])
    done = eggroll("tune", "tiny", "--resume", "run", "-g", "6")
    assert done.status == 0, done.err
    assert "warning: damaged checkpoints are skipped, the one of generation 2 is used instead:" in done.out
    assert f"generation-000004: {newest.name} is truncated: 5000 of " in done.out
    assert eggroll.tune("-g", "6", "--checkpoint-every", "2", "-o", "whole").status == 0
    assert (eggroll.work / "run/updates.jsonl").read_text() == (eggroll.work / "whole/updates.jsonl").read_text()
    for file in run.checkpoints.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    done = eggroll("tune", "tiny", "--resume", "run", "-g", "7")
    assert refused(
        done,
        "none of the checkpoints in run/checkpoints can be used:",
        "is truncated: ",
        "Nothing is lost: move run/checkpoints away, and --resume rebuilds the weights",
    )
    assert len(run.updates()) == 6
    (eggroll.work / "run/checkpoints").rename(eggroll.work / "moved")
    assert eggroll("tune", "tiny", "--resume", "run", "-g", "7").status == 0
    assert eggroll("tune", "tiny", "--resume", "whole", "-g", "7").status == 0
    assert (eggroll.work / "run/updates.jsonl").read_text() == (eggroll.work / "whole/updates.jsonl").read_text()


def test_config_with_unknown_settings(eggroll):
    assert eggroll.tune("-g", "1", "-o", "run").status == 0
    path = eggroll.work / "run/config.json"
    config = json.loads(path.read_text())
    config["options"]["momentun"] = 0.5
    del config["check"]
    path.write_text(json.dumps(config))
    done = eggroll("tune", "tiny", "--resume", "run")
    assert refused(done, "run/config.json has settings that this version does not know: momentun")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from eggroll.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "generations"), [(3000, "40"), (60_000, "2")], ids=["in the middle of a log", "in a checkpoint"]
)
def test_disk_full_while_writing(eggroll, limit, generations):
    """A limit on file sizes stops a write in the middle, as a full disk does; then it is lifted."""
    arguments = [*eggroll.tune_arguments, "-g", generations, "-o", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written: a limit on the size of files is in force (File too large)" in done.stderr
    assert (
        "Everything written before is intact: raise the limit (ulimit -f), then continue with --resume" in done.stderr
    )
    run = RunDir.open("run")
    finished = len(run.updates())
    assert finished > 0
    assert f"The run in run is intact, with {finished} finished generation" in done.stderr
    assert eggroll("tune", "--resume", "run").status == 0
    assert eggroll.tune("-g", generations, "-o", "whole").status == 0
    assert (eggroll.work / "run/updates.jsonl").read_text() == (eggroll.work / "whole/updates.jsonl").read_text()
    assert run.latest_checkpoint().tensors["sha256"] == RunDir.open("whole").latest_checkpoint().tensors["sha256"]


@pytest.mark.parametrize(
    "command",
    [
        "rl --env CartPole-v1 --pop_size 4 --hidden 8 -g 1",
        "pretrain --data text.txt --n_layers 1 --hidden 16 --pop_size 4 -g 1",
        "recipe cartpole -p 4 -g 1",
        "tune smollm2-135m -r perplexity -d text.txt",
    ],
)
def test_an_unknown_tracker_leaves_no_run_behind(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 50)
    assert main([*command.split(), "--report-to", "tensorbord", "-o", "out"]) == 1
    assert (
        "report_to (='tensorbord') must be one or several of: tensorboard, wandb, trackio, none"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [("--task",), ("--task", "--shots", "2")])
@pytest.mark.parametrize("command", ["tune", "eval"])
def test_a_task_without_its_name(eggroll, command, given):
    done = eggroll(command, "tiny", *given)
    assert done.status == 2
    assert "Missing value for argument '--task'" in plain(done)
    assert done.err.endswith(f"--task needs the name of a task after it: {', '.join(names())}, or reasoning-gym:NAME\n")
    assert not (eggroll.work / "runs").exists()


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (("tune", "--task", "countdown"), ("Missing from eggroll tune: MODEL", "Hub id, local directory, .gguf file")),
        (("eval",), ("--task STR calculator, countdown, gsm8k, guess_number, maze, one_sentence",
                     "eval needs a model, or two to compare, and a task: eggroll eval smollm2-135m --task countdown")),
        (("rl", "CartPole-v9"),
         ("'CartPole-v9' needs the option before it that says what it is: eggroll rl --env CartPole-v9",)),
        (("pretrain", "book.txt"), ("eggroll pretrain --data book.txt",)),
    ],
)  # fmt: skip
def test_a_newcomers_first_tries(eggroll, given, texts):
    done = eggroll(*given)
    assert done.status == 2
    for text in texts:
        assert text in plain(done)
    assert not (eggroll.work / "runs").exists()


@pytest.mark.parametrize("command", ["tune", "eval"])
@pytest.mark.parametrize("shots", ["99", "-1"])
def test_shots_that_are_too_many_or_too_few(eggroll, command, shots):
    done = eggroll(command, "tiny", "--task", "countdown", "--shots", shots)
    assert refused(done, f"shots (={shots}) must be from 0 to 16 worked examples")
    assert not (eggroll.work / "runs").exists()


def test_a_run_that_is_not_there(eggroll):
    assert refused(eggroll("replay", "nothere"), "nothere does not exist. Give the directory that a run was told to")


def test_numbers_of_countdown_that_are_none(eggroll):
    (eggroll.work / "own.jsonl").write_text('{"prompt": "a", "numbers": [6, 7, 2], "target": "4O"}\n')
    done = eggroll("tune", "tiny", "--task", "countdown", "-d", "own.jsonl")
    assert refused(done, "data set own.jsonl, row 1: target (='4O') must be a whole number, as in ")
    assert not (eggroll.work / "runs").exists()


def test_several_unknown_flags_are_told_at_once(eggroll):
    done = eggroll("tune", "tiny", "--generation", "3", "--pop_sise=8", "--zzz")
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        "Unrecognized options: --generation, --pop_sise, --zzz. Perhaps you meant --generations, --pop-size. "
        "eggroll tune --help-all shows every option\n"
    )
