"""A whole run through the command line, and what it leaves on disk."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from eggroll.cli.parse import parse
from eggroll.cli.tune import OPTIONS, _cell, default_options, with_task
from eggroll.cli.watch import show_worse
from eggroll.llm.choosing.auto import with_stand_ins
from eggroll.llm.tasks import get_task
from eggroll.run.console import number
from eggroll.run.run_dir import RunDir

# A flag here is a promise to users: none may go or change its short form, and a new one is added here on purpose.
FLAGS = {
    "tune": """
        MODEL --reward/-r --task --shots --dataset/-d --prompts --eval-prompts --output/-o --resume --generations/-g
        --population/-p/--population-size/--pop-size --rank --sigma --lr --target-modules --exclude --embeddings
        --head --vectors --group-size --momentum --betas --chat --samples-per-generation --optimizer --lr-schedule
        --lr-decay --sigma-schedule --sigma-decay --sampling --noise-reuse --elite-k --weight-decay
        --anchored-weight-decay --quantized-update --residual-decay --residual-start --residual-generations
        --move-threshold
        --fitness-shaping --rounding --batch-size --max-tokens --max-length --temperature --system
        --samples-per-prompt --pass-at --engine-args --workers --ray-address --worker-cpus --worker-gpus
        --batch-members/--members-per-forward --prompts-per-generation --eval-every --checkpoint-every --dtype
        --device --backend --quantize --accept-changes --report-to --seed --trust-remote-code --keep --patience
        --config --revision --attn-implementation --push-to-hub --hub-model-id --hub-private
        --minutes
        --judge-url --judge-model --judge-prompt --judge-reference --judge-scale --judge-weight --judge-requests
        --judge-rate --judge-timeout --judge-failures
        --world/--environment --max-turns --world-timeout --world-failure-score --world-workers
    """,
    "eval": """
        MODEL --task --shots --problems --samples --max-tokens --max-length --temperature --chat --system --batch-size
        --output/-o --dtype --device --quantize --seed --trust-remote-code --config --revision --attn-implementation
        --max-turns --world-timeout --world-failure-score --world-workers
    """,
    "chat": """
        MODEL --question/-q --only --max-tokens --max-length --temperature --system --chat --seed --dtype --device
        --quantize --trust-remote-code --revision --attn-implementation
    """,
    "generate": """
        MODEL FILE --output/-o --batch-size --only --max-tokens --max-length --temperature --system --chat --seed
        --dtype --device --quantize --trust-remote-code --revision --attn-implementation
    """,
    # All settings of tune, so that its command line can be pasted, and the length of a prompt.
    "info": """
        MODEL --population/-p/--population-size/--pop-size --rank --target-modules --exclude --embeddings --head
        --vectors --optimizer --sampling --batch-size --prompt-tokens --max-tokens --max-length --batch-members
        --dtype --device --quantize --trust-remote-code --betas --chat --checkpoint-every --elite-k --eval-every
        --fitness-shaping --generations/-g --group-size --lr --lr-decay --lr-schedule --members-per-forward
        --momentum --noise-reuse --pass-at --prompts-per-generation --rounding --samples-per-generation
        --samples-per-prompt --seed --sigma --sigma-decay --sigma-schedule --system --temperature --weight-decay
        --anchored-weight-decay --quantized-update --residual-decay --residual-start --residual-generations
        --move-threshold --config
        --revision --attn-implementation --max-turns --world-timeout --world-failure-score --world-workers
    """,
    "replay": "RUN --to --output/-o --trust-remote-code --allow-difference",
    "report": "RUN -o/--output",
    "runs": "FOLDER -s/--sort --reverse -f/--filter -w/--watch",
}
DEFAULTS = {
    "generations": "auto",
    "population_size": "auto",
    "prompts_per_generation": "auto",
    "rank": 1,
    "sigma": "auto",
    "lr": "auto",
    "lr_schedule": "auto",
    "minutes": None,
    "optimizer": "sgd",
    "seed": 42,
    "target_modules": None,
    "fitness_shaping": "centered_rank",
    "elite_k": 0,
    "weight_decay": 0.0,
    "max_tokens": 128,
    "backend": "torch",
}
FILES = {
    "config.json",
    "environment.json",
    "result.json",
    "metrics.jsonl",
    "updates.jsonl",
    "samples.jsonl",
    "checkpoints",
    "tensorboard",
    "report.html",
    "model",
}


def parsed(arguments):
    return parse(OPTIONS, arguments, prog="eggroll tune", description="", default=default_options(arguments))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_are_frozen(command, eggroll, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = eggroll(command, "--help-all").out
    found = set()
    for line in shown.splitlines():
        entry = re.split(r"(?<=\S)  ", line)[0].strip()
        if entry.startswith("-"):
            found |= {word for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", entry) if not word.startswith("--no-")}
        elif entry.split(" ")[0] in ("MODEL", "RUN", "FOLDER", "FILE"):
            found.add(entry.split(" ")[0])
    assert found == {flag for group in FLAGS[command].split() for flag in group.split("/")}


def test_the_defaults_are_frozen():
    options = OPTIONS(model="tiny")
    assert {name: getattr(options, name) for name in DEFAULTS} == DEFAULTS


def test_a_run_leaves_every_file(eggroll):
    """The last --report-to counts, so the first one of the fixture is overridden."""
    done = eggroll.tune(
        "--eval-prompts",
        "held.txt",
        "-g",
        "4",
        "--eval-every",
        "2",
        "--checkpoint-every",
        "2",
        "--report-to",
        "tensorboard",
        "-o",
        "run",
    )
    assert done.status == 0, done.err
    run = eggroll.work / "run"
    assert {path.name for path in run.iterdir()} == FILES
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["sigma"] == 0.05
    assert config["options"]["population_size"] == 4
    environment = json.loads((run / "environment.json").read_text())
    assert environment["model"] == "tiny"
    assert environment["device"] == "cpu"
    assert environment["packages"]["torch"]
    metrics = lines(run / "metrics.jsonl")
    assert [line["generation"] for line in metrics] == [0, 1, 2, 3, 4]
    assert metrics[0]["event"] == "start"
    assert ["heldout_reward" in line for line in metrics] == [True, False, True, False, True]
    wanted = {
        "fitness_mean",
        "fitness_max",
        "fitness_min",
        "fitness_std",
        "sigma",
        "lr",
        "update_norm",
        "members_per_s",
        "tokens_per_s",
        "draw_s",
        "evaluate_s",
        "update_s",
        "elapsed_s",
        "invalid_scores",
        "scores",
        "memory_bytes",
    }
    assert all(wanted <= set(line) for line in metrics[1:])
    assert ["update_cosine" in line for line in metrics] == [False, False, True, True, True]
    updates = lines(run / "updates.jsonl")
    assert [set(line) for line in updates] == [{"generation", "sigma", "lr", "shaped_fitness", "check"}] * 4
    assert all(len(line["shaped_fitness"]) == 4 for line in updates)
    samples = lines(run / "samples.jsonl")
    assert {row["split"] for row in samples} == {"train", "heldout"}
    assert {row["generation"] for row in samples if row["split"] == "heldout"} == {0, 2, 4}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"generation-000002", "generation-000004"}
    assert list((run / "tensorboard").iterdir())
    report = (run / "report.html").read_text()
    assert "from_pretrained(&quot;run/model&quot;)" in report or 'from_pretrained("run/model")' in report
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    weights, saved = RunDir.open(run).latest_checkpoint().load(), dict(model.named_parameters())
    evolved = [name for name in weights if name.startswith("parameter/")]
    assert len(evolved) == 14
    assert all(weights[name].equal(saved[name.removeprefix("parameter/")]) for name in evolved)
    assert AutoTokenizer.from_pretrained(run / "model").decode([40]) == AutoTokenizer.from_pretrained("tiny").decode(
        [40]
    )


def test_what_a_person_reads(eggroll):
    done = eggroll.tune("--eval-prompts", "held.txt", "-g", "2", "-o", "run")
    out = done.out.splitlines()
    assert out[0] == "tiny  32.29 k parameters, 15.36 k evolved in 14 tensors, float32 on cpu"
    assert out[1] == "reward score, 6 prompts, 2 a generation"
    assert out[2] == "population 4 (antithetic), rank 1, sigma 0.05, lr 0.02, sgd, seed 42"
    assert "run directory: run" in out
    assert "tiny on score.py: generation 0 of 2" in out
    assert sum(line.startswith("generation 2/2 | fitness mean -") for line in out) == 1
    assert any(line.startswith("held-out reward  -") and " before, " in line for line in out)
    assert "that changed, with their rewards" in done.out
    assert "model    run/model" in out
    assert "ask it   eggroll chat run" in out
    assert 'model = AutoModelForCausalLM.from_pretrained("run/model")' in out
    assert 'tokenizer = AutoTokenizer.from_pretrained("run/model")' in out
    assert 'chat = [{"role": "user", "content": "What is rain?"}]' in out
    assert done.err == ""


WORSE = """
def score(text):
    calls = open("calls", "a+")
    calls.write("x")
    calls.flush()
    return -float(calls.tell())
"""


def test_a_run_that_got_worse_says_so(eggroll):
    """Each call gives less than the one before, so no generation does better than the model as it was."""
    (eggroll.work / "worse.py").write_text(WORSE)
    done = eggroll.tune("-r", "worse.py", "--eval-prompts", "held.txt", "-g", "2", "--eval-every", "1", "-o", "my run")
    assert done.status == 0, done.err
    before, after, _ = (line["heldout_reward"] for line in RunDir.open("my run").metrics())
    command = "eggroll replay 'my run' --to 0 -o 'my run/best'"
    assert (
        f"the held-out score got worse: {number(before)} before training, {number(after)} after generation 1; no "
        f"generation did better than that. Rebuild the weights from before training:\n         {command}\n"
    ) in done.out
    assert eggroll(*shlex.split(command)[1:]).status == 0
    assert (eggroll.work / "my run/best/model.safetensors").exists()


@pytest.mark.parametrize(("scores", "best"), [([1.0, 3.0, 2.0, 0.5], 10), ([1.0, None, 1.5, 1.5, 0.0], 20)])
def test_the_best_generation_of_a_run_that_got_worse(tmp_path, scores, best, capsys):
    run = RunDir.create(tmp_path / "run", {})
    for index, score in enumerate(scores):
        run.append_metrics({"generation": 10 * index, **({} if score is None else {"heldout_reward": score})})
    show_worse(Console(soft_wrap=True, highlight=False), run)
    shown = capsys.readouterr().out
    assert f"the best was {number(scores[best // 10])} after generation {best}. Rebuild those weights:" in shown
    assert f"eggroll replay {tmp_path}/run --to {best} -o {tmp_path}/run/best" in shown


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 1.0], [1.0, 0.0, 2.0]])
def test_a_run_that_did_not_get_worse_says_nothing(tmp_path, scores, capsys):
    run = RunDir.create(tmp_path / "run", {})
    for index, score in enumerate(scores):
        run.append_metrics({"generation": index, "heldout_reward": score})
    show_worse(Console(), run)
    assert capsys.readouterr().out == ""


def test_a_run_without_an_output_gets_a_name(eggroll):
    assert eggroll.tune("-g", "1").status == 0
    (run,) = (eggroll.work / "runs").iterdir()
    assert run.name.startswith("tiny-score-20")


def test_the_same_command_twice_gives_the_same_run(eggroll):
    for name in ("a", "b"):
        assert eggroll.tune("-g", "3", "--temperature", "0.7", "-o", name).status == 0
    updates = [(eggroll.work / name / "updates.jsonl").read_text() for name in ("a", "b")]
    assert updates[0] == updates[1]
    other = eggroll.tune("-g", "3", "--temperature", "0.7", "-o", "c", "--seed", "43")
    assert other.status == 0
    assert (eggroll.work / "c" / "updates.jsonl").read_text() != updates[0]


def test_flags_reach_the_run(eggroll):
    done = eggroll.tune(
        "-g",
        "1",
        "-o",
        "run",
        "--target-modules",
        "q_proj",
        "v_proj",
        "--exclude",
        "layers.1",
        "--sampling",
        "one_sided",
        "--optimizer",
        "sgd",
        "--fitness-shaping",
        "normalized",
        "--elite-k",
        "2",
        "--weight-decay",
        "0.1",
        "--noise-reuse",
        "2",
        "--lr-decay",
        "0.9",
        "--sigma-decay",
        "0.8",
        "--batch-members",
        "2",
        "--lr-schedule",
        "cosine",
        "--system",
        "Be brief.",
    )
    assert done.status == 0, done.err
    config = json.loads((eggroll.work / "run" / "config.json").read_text())["options"]
    expected = {
        "target_modules": ["q_proj", "v_proj"],
        "exclude": ["layers.1"],
        "sampling": "one_sided",
        "antithetic": False,
        "optimizer": "sgd",
        "fitness_shaping": "normalized",
        "elite_k": 2,
        "weight_decay": 0.1,
        "noise_reuse": 2,
        "lr_decay": 0.9,
        "sigma_decay": 0.8,
        "members_per_forward": 2,
        "lr_schedule": "cosine",
        "system": "Be brief.",
    }
    assert {key: config[key] for key in expected} == expected
    assert "evolved in 2 tensors" in done.out
    assert "population 4 (one_sided)" in done.out


def test_bfloat16(eggroll):
    done = eggroll.tune("-g", "2", "-o", "run", "--dtype", "bfloat16")
    assert done.status == 0, done.err
    tensors = RunDir.open("run").latest_checkpoint().load()
    assert {str(tensor.dtype) for name, tensor in tensors.items() if name.startswith("parameter/")} == {
        "torch.bfloat16"
    }
    assert {str(tensor.dtype) for name, tensor in tensors.items() if name.startswith("master/")} == {"torch.float32"}


def test_a_task_brings_its_settings(eggroll):
    (eggroll.work / "held.jsonl").write_text('{"prompt": "What is a violin?", "answer": ["instrument"]}\n')
    given = [
        "-g",
        "1",
        "-p",
        "2",
        "--max-tokens",
        "2",
        "--batch-size",
        "1",
        "--dtype",
        "float32",
        "--report-to",
        "none",
    ]
    done = eggroll("tune", "tiny", "--task", "one_sentence", *given, "--eval-prompts", "held.jsonl", "-o", "run")
    assert done.status == 0, done.err
    assert "reward one_sentence, " in done.out
    config = json.loads((eggroll.work / "run" / "config.json").read_text())["options"]
    assert config["population_size"] == 2
    assert config["max_tokens"] == 2
    settings = get_task("one_sentence").settings
    assert config["sigma"] == settings["sigma"]
    assert config["lr"] == settings["lr"]
    done = eggroll("tune", "tiny", "--task", "one_sentence", *given, "--eval-prompts", "held.txt", "-o", "other")
    assert done.status == 1
    assert done.err.startswith('error: the reward "one_sentence" needs a column "answer"')


def test_what_models_write_does_not_command_the_terminal(capsys):
    Console(width=80).print(_cell("\x1b[2J\x1b]0;gone\x07 [bold]as it is[/]\n\ttwo  lines\x00", 0.5))
    assert capsys.readouterr().out == "\ufffd[2J\ufffd]0;gone\ufffd [bold]as it is[/] two lines\ufffd  (0.50)\n"


@pytest.mark.slow
def test_in_a_process_of_its_own(work):
    """The installed command, piped: plain lines, no escape sequences, exit status 0."""
    command = [sys.executable, "-m", "eggroll.cli.main", "tune", "tiny", "--reward", "perplexity", "-d", "texts.txt"]
    command += ["-g", "2", "-p", "4", "--dtype", "float32", "-o", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "reward perplexity, 12 texts, 8 a generation" in done.stdout
    assert "\x1b" not in done.stdout
    assert "Traceback" not in done.stderr
    assert FILES - {"samples.jsonl", "result.json"} <= {path.name for path in (work / "run").iterdir()}


def test_worked_examples_come_before_each_problem(eggroll):
    done = eggroll("tune", "tiny", "--task", "countdown", "--shots", "1", "-g", "1", "-p", "2", "--max-tokens", "2",
                   "--batch-size", "2", "--eval-every", "0", "-o", "run")  # fmt: skip
    assert done.status == 0, done.err
    (sample, *_) = lines(eggroll.work / "run" / "samples.jsonl")
    assert sample["prompt"].startswith("Numbers: ")
    config = json.loads((eggroll.work / "run" / "config.json").read_text())
    assert config["options"]["shots"] == 1
    assert config["options"]["system"].startswith("Make the target out of the numbers")


@pytest.mark.parametrize(("backend", "vectors"), [("torch", True), ("vllm", False)])
def test_a_task_does_not_recommend_what_adapters_of_vllm_cannot_evolve(backend, vectors):
    options = OPTIONS(model="tiny", task="one_sentence", backend=backend)
    assert with_task(options).vectors is vectors
    assert with_task(options).lr == get_task("one_sentence").settings["lr"]


def test_worked_examples_of_no_task_are_refused(eggroll):
    done = eggroll("tune", "tiny", "--prompts", "prompts.txt", "--shots", "2", "-o", "run")
    assert done.status != 0
    assert "--shots 2 needs a --task whose worked examples are shown; none is given" in done.err
    assert not (eggroll.work / "run").exists()


@pytest.mark.parametrize("option", ["--prompts", "--dataset", "--eval-prompts"])
def test_worked_examples_beside_a_file_of_prompts_are_refused(eggroll, option):
    done = eggroll("tune", "tiny", "--task", "countdown", "--shots", "2", option, "prompts.txt", "-o", "run")
    assert done.status != 0
    assert f"{option} prompts.txt takes their place as it is: training and held-out prompts would differ" in done.err
    assert not (eggroll.work / "run").exists()


def test_what_is_typed_counts_more_than_what_a_task_recommends():
    """Even where it is the default of a run without a task."""
    given = ["tiny", "--task", "countdown", "--rank", "8", "--optimizer", "adam", "--max-tokens=128"]
    options = parsed(given)
    assert (options.rank, options.optimizer, options.max_tokens) == (8, "adam", 128)
    wrong = [*given, "--backend", "foo"]
    with pytest.raises(SystemExit):
        parsed(wrong)
    assert options.population_size == get_task("countdown").settings["population_size"]


def test_a_learning_rate_that_is_not_given_is_that_of_the_optimizer():
    """The task's is sgd's: with Adam, a step of 0.05 per entry would be five times sigma."""
    task = ["tiny", "--task", "countdown"]
    assert parsed(task).lr == 0.05
    assert parsed([*task, "--optimizer", "sgd"]).lr == 0.05
    assert parsed([*task, "--optimizer", "adamw"]).lr == "auto"
    assert parsed([*task, "--optimizer=momentum"]).lr == "auto"
    assert parsed([*task, "--optimizer", "adam", "--lr", "0.05"]).lr == 0.05
    assert parsed(["tiny", "--optimizer", "adam"]).lr == "auto"


def test_a_task_keeps_its_sigma_unless_auto_is_typed():
    assert parsed(["tiny", "--task", "one_sentence"]).sigma == 0.01
    assert parsed(["tiny", "--task", "one_sentence", "--sigma", "auto"]).sigma == "auto"
    assert parsed(["tiny", "--task", "one_sentence", "--sigma", "auto"]).lr == 0.05
    assert parsed(["tiny"]).sigma == "auto"


def test_help_guide_and_demo_have_one_set_of_defaults():
    guide = (Path(__file__).parents[2] / "docs" / "tune.md").read_text(encoding="utf-8")
    demo, options = get_task("one_sentence").settings, OPTIONS(model="tiny")
    numbers = with_stand_ins(options)
    words = {
        "population_size": "--population", "rank": "--rank", "sigma": "--sigma", "lr": "--lr",
        "optimizer": "--optimizer", "prompts_per_generation": "--batch-size",
    }  # fmt: skip
    for name, flag in words.items():
        value = getattr(options, name)
        assert demo[name] == getattr(numbers, name)
        (start,) = re.findall(rf"^\| `{flag}`[^|]*\| ([\w.]+)", guide, re.MULTILINE)
        assert start == str(value)


def test_a_data_set_beside_a_task_is_what_is_trained_on(eggroll):
    done = eggroll("tune", "tiny", "--task", "zeros", "-d", "prompts.txt", "-g", "1", "-p", "2", "--max-tokens", "2",
                   "--batch-size", "2", "--eval-every", "0", "-o", "run")  # fmt: skip
    assert done.status == 0, done.err
    prompts = (eggroll.work / "prompts.txt").read_text().splitlines()
    samples = lines(eggroll.work / "run" / "samples.jsonl")
    trained = {sample["prompt"] for sample in samples if sample.get("split") != "heldout"}
    assert trained
    assert trained <= set(prompts)
    done = eggroll("tune", "tiny", "--task", "zeros", "-d", "prompts.txt", "--prompts", "prompts.txt", "-o", "two")
    assert "--dataset and --prompts mean the same; give one of them" in done.err
