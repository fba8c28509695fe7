"""A run directory may come from anyone: nothing that it says makes code run that its reader did not ask for."""

import json
import shlex
import shutil

import pytest

from eggroll.run.run_dir import RunDir

LAMBDA = "lambda text: open('ran', 'w').close() or 1.0"


@pytest.fixture
def given(eggroll):
    """``given(reward=...)``: a run directory ``base`` with these options, as if someone had sent it."""

    def make(kind="tune", **options):
        if kind == "tune":
            options = {"model": "tiny", "prompts": "prompts.txt", **options}
        stored = {"population_size": 4, "generations": 2, **options}
        shutil.rmtree("base", ignore_errors=True)
        RunDir.create("base", {"kind": kind, "options": stored}, command=["eggroll"])

    return make


def edit(**options):
    path = RunDir.open("base").path / "config.json"
    config = json.loads(path.read_text())
    config["options"].update(options)
    config.pop("check", None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("reward", [LAMBDA, "base/mine.py", "base/mine.py:score", "mine:score"])
def test_a_reward_of_a_run_directory_is_not_run(eggroll, given, reward):
    given(reward=reward)
    quoted = shlex.quote(reward)
    for place in ("base/mine.py", "mine.py"):
        (eggroll.work / place).write_text("open('ran', 'w')\ndef score(text):\n    return 1.0\n")
    done = eggroll("tune", "--resume", "base", "-g", "6")
    assert done.status == 1
    assert done.err == (
        f"error: this run used --reward {quoted}, which runs code, and a run's directory is not trusted with that: it "
        "may come from someone else, or have been changed. If you trust the code, add it to the command:\n"
        f"  eggroll tune --resume base --reward {quoted} --generations 6\n"
    )
    assert not (eggroll.work / "ran").exists()


def test_other_settings_that_run_code(eggroll, given):
    (eggroll.work / "mine.py").write_text("open('ran', 'w')\n")
    given(reward="zeros", fitness_shaping="mine:shape", trust_remote_code=True)
    done = eggroll("tune", "--resume", "base")
    assert done.status == 1
    assert "  eggroll tune --resume base --fitness-shaping mine:shape --trust-remote-code\n" in done.err
    pytest.importorskip("gymnasium")
    given("rl", env="gymnasium/mine:Foo-v0")
    done = eggroll("rl", "--resume", "base", "--no-render")
    assert done.status == 1
    assert "  eggroll rl --resume base --env gymnasium/mine:Foo-v0\n" in done.err
    done = eggroll("replay", "base")
    assert done.status == 1
    assert "add --trust-remote-code: eggroll replay base --trust-remote-code\n" in done.err
    assert not (eggroll.work / "ran").exists()


def test_control_characters_of_a_setting_are_not_printed(eggroll, given):
    given(reward="lambda text: '\x1b]0;title\x07'")
    done = eggroll("tune", "--resume", "base")
    assert done.status == 1
    assert "\x1b]" not in done.err
    assert "\\u001b]0;title" in done.err


def test_a_run_of_ones_own_goes_on_until_its_code_is_changed(eggroll, monkeypatch):
    assert eggroll.tune("-g", "1", "-o", "base").status == 0
    shutil.copytree("base", "copied")
    done = eggroll("tune", "--resume", "base", "-g", "2")
    assert done.status == 0, done.err
    edit(reward=LAMBDA)
    assert "error: this run used --reward 'lambda" in eggroll("tune", "--resume", "base", "-g", "3").err
    edit(reward="./score.py")  # another word, although it is the same file
    assert "error: this run used --reward ./score.py" in eggroll("tune", "--resume", "base", "-g", "3").err
    # Another user, or the same one on another machine: asked once, known from then on.
    monkeypatch.setenv("XDG_STATE_HOME", str(eggroll.work / "other"))
    refused = eggroll("tune", "--resume", "copied", "-g", "2")
    assert refused.status == 1
    assert "  eggroll tune --resume copied --reward score.py --generations 2\n" in refused.err
    done = eggroll("tune", "--resume", "copied", "--reward", "score.py", "--generations", "2")
    assert done.status == 0, done.err
    assert (eggroll.work / "other/eggroll/key").stat().st_mode & 0o777 == 0o600
    assert eggroll("tune", "--resume", "copied", "-g", "3").status == 0
    # A key that others can read proves nothing.
    (eggroll.work / "other/eggroll/key").chmod(0o644)
    assert eggroll("tune", "--resume", "copied", "-g", "4").status == 1
    # The same word means another file in another folder.
    (eggroll.work / "other/eggroll/key").chmod(0o600)
    (eggroll.work / "elsewhere").mkdir()
    monkeypatch.chdir(eggroll.work / "elsewhere")
    assert "--reward score.py" in eggroll("tune", "--resume", "../copied", "-g", "4").err


CODE = """
open({ran!r}, "a").write("x")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_replay_runs_a_models_code_only_if_it_is_told_to(eggroll, model_dir):
    ran = eggroll.work / "ran"
    shutil.copytree(model_dir, "own")
    (eggroll.work / "own/own.py").write_text(CODE.format(ran=str(ran)))
    path = eggroll.work / "own/config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto}))
    arguments = ["own", *eggroll.tune_arguments[2:], "-g", "1", "-o", "base"]
    assert eggroll("tune", *arguments, "--trust-remote-code").status == 0
    assert ran.exists()
    ran.unlink()
    done = eggroll("replay", "base", "--to", "1")
    assert done.status == 1
    assert done.err == (
        "error: this run used --trust-remote-code, which runs code, and a run's directory is not trusted with that. If "
        "you trust the code, add --trust-remote-code: eggroll replay base --to 1 --trust-remote-code\n"
    )
    done = eggroll("tune", "--resume", "base", "-g", "2")
    assert done.status == 1
    assert "  eggroll tune --resume base --trust-remote-code --generations 2\n" in done.err
    assert not ran.exists()
    # A replay needs no reward.
    (eggroll.work / "score.py").unlink()
    done = eggroll("replay", "base", "--to", "1", "--trust-remote-code")
    assert done.status == 0, done.err
    assert "equal to its checkpoint, bit for bit" in done.out
