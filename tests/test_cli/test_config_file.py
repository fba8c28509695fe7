"""Settings from a file: what it may be called, that flags win, and what is said of a file that is wrong."""

import json

import pytest

from eggroll.cli.config_file import parse_with_file
from eggroll.cli.main import load, options_of
from eggroll.errors import ConfigError

RUN = """\
model: tiny
reward: score.py
prompts: prompts.txt
population: 4
rank: 1
max-tokens: 4
prompts_per_generation: 2
dtype: float32
sigma: 5e-2
lr: 0.02
report_to: none
generations: 2
"""


def options(command, *arguments):
    return options_of(load(command), [str(argument) for argument in arguments], prog=f"eggroll {command}")


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(text, name="run.yaml"):
        (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
        return name

    return call


def test_a_run_from_a_file_and_its_config_again(eggroll):
    (eggroll.work / "run.yaml").write_text(RUN)
    done = eggroll("tune", "--config", "run.yaml", "-g", "1", "-o", "first")
    assert done.status == 0, done.err
    stored = json.loads((eggroll.work / "first/config.json").read_text())["options"]
    assert (stored["generations"], stored["sigma"], stored["population_size"]) == (1, 0.05, 4)
    assert "config" not in stored
    # The run's own settings again, with the reward: it was asked for here. Its directory is another one.
    done = eggroll("tune", "--config", "first/config.json", "-o", "second")
    assert done.status == 0, done.err
    first, second = ((eggroll.work / name / "updates.jsonl").read_text() for name in ("first", "second"))
    assert first == second
    again = eggroll("tune", "--resume", "first", "--config", "run.yaml")
    assert again.status == 1
    assert "--resume takes the settings from the run" in again.err


def test_flags_win_and_names_are_those_of_the_flags(write):
    write("model: tiny\ntask: countdown\n--batch-size: 3\npop-size: 6\nchat: no\nbetas: [0.8, 0.9]\nseed: 7\n")
    found = options("tune", "other", "--seed", "9", "--config", "run.yaml")
    assert (found.model, found.seed, found.prompts_per_generation, found.population_size) == ("other", 9, 3, 6)
    assert (found.chat, found.betas) == (False, (0.8, 0.9))
    assert found.max_tokens == options("tune", "other", "--task", "countdown").max_tokens != 128


def test_a_setting_of_the_file_counts_more_than_what_a_task_recommends(write):
    write("model: tiny\ntask: countdown\nmax_tokens: 5\n")
    assert options("tune", "--config=run.yaml").max_tokens == 5
    assert options("tune", "--config=run.yaml", "--max-tokens", "6").max_tokens == 6


def test_what_cannot_work_in_the_file_may_be_mended_by_a_flag(write):
    write({"population_size": 7, "model": "tiny"}, "run.json")
    with pytest.raises(ConfigError, match="must be even"):
        options("tune", "--config", "run.json")
    assert options("tune", "--config", "run.json", "-p", "8").population_size == 8


def test_lists_are_positionals_too(write):
    write("models: [before, after]\ntask: countdown\n")
    assert options("eval", "--config", "run.yaml").models == ("before", "after")
    assert options("eval", "one", "--config", "run.yaml").models == ("one",)


def test_other_commands(write):
    write("env: CartPole-v1\nsigma: 0.3\n")
    assert options("rl", "--config", "run.yaml").sigma == 0.3
    write("n-layers: 2\nsample-length: 5\n")
    assert options("pretrain", "--config", "run.yaml").sample_length == 5
    from eggroll.cli.kinds import load_recipe
    from eggroll.cli.recipe import options_type

    write("seed: 5\n")
    kind = options_type(load_recipe("cartpole"))
    found = parse_with_file(kind, ["--config", "run.yaml"], prog="eggroll recipe cartpole", description="")
    assert (type(found), found.seed) == (kind, 5)


def test_info_takes_a_file_for_tune(write):
    write(RUN)
    assert options("info", "--config", "run.yaml").population_size == 4


WRONG = [
    ("simga: 0.1\nnonsense: 1", "unknown setting 'simga'; did you mean sigma?"),
    ("simga: 0.1\nnonsense: 1", "--config run.yaml has 2 problems"),
    ("sigma: high", 'sigma (="high") must be a number'),
    ("seed: 1.5", "seed (=1.5) must be a whole number"),
    ("report_to: no", "report_to (=false) must be text"),
    ("target_modules: q_proj", 'target_modules (="q_proj") must be a list or null'),
    ("optimizer: adan", "optimizer (='adan') must be one of: sgd, momentum, adam, adamw; did you mean 'adam'?"),
    ("attn-implementation: fast", "attn_implementation (='fast') must be one of: eager, sdpa"),
    ("seed: 2026-11-30", 'seed (="2026-11-30") must be a whole number'),
    ("betas: &a [*a]", "is not YAML that holds settings: Circular reference detected"),
    ("population: 4\npopulation-size: 6", "population-size gives population_size a second time"),
    ("resume: there", "resume is about one command; give --resume on the command line"),
    ("- a", "must hold settings by name, such as 'sigma: 0.01', one a line; it holds a list"),
    ("a: [", "--config run.yaml is not YAML that holds settings: "),
    ("sigma: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_a_wrong_file(write, text, said):
    with pytest.raises(ConfigError) as caught:
        options("tune", "tiny", "--config", write(text))
    assert said in str(caught.value)


def test_files_that_are_not_there(write, tmp_path):
    write(RUN)
    with pytest.raises(ConfigError, match=r"there is no such file; near matches: run\.yaml"):
        options("tune", "--config", "run.yml")
    with pytest.raises(ConfigError, match="is a directory, not a file of settings"):
        options("tune", "--config", tmp_path)
    with pytest.raises(ConfigError, match="is not valid JSON"):
        options("tune", "--config", write("{", "run.json"))
    with pytest.raises(ConfigError, match="takes one --config FILE"):
        options("tune", "--config", "run.yaml", "--config", "other.yaml")


def test_a_runs_directory_is_not_trusted_with_code(write):
    stored = {"model": "tiny", "reward": "lambda text: 1.0", "trust_remote_code": True, "output": "there"}
    write({"kind": "tune", "options": stored}, "config.json")
    with pytest.raises(ConfigError) as caught:
        options("tune", "--config", "config.json")
    assert "add to the command: --reward 'lambda text: 1.0' --trust-remote-code" in str(caught.value)
    found = options("tune", "--config", "config.json", "-r", "perplexity", "--trust-remote-code")
    assert (found.reward, found.trust_remote_code, found.output) == ("perplexity", True, None)
    # The same settings in a file of one's own are one's own.
    assert options("tune", "--config", write(stored, "own.json")).reward == "lambda text: 1.0"
    with pytest.raises(ConfigError, match="is of a run of eggroll tune, not of eggroll rl"):
        options("rl", "--config", "config.json")
