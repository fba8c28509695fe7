"""The comparison with GRPO: both methods really train a tiny model, and the picture and table come out."""

import json
import sys

import pytest
import torch
import transformers
from tiny_models import write_llama

SETTINGS = {
    "eggroll": {"population_size": 4, "prompts_per_generation": 2, "lr": 0.05},
    "grpo": {"learning_rate": 1e-3, "num_generations": 2, "per_device_train_batch_size": 4},
}


@pytest.fixture
def one_run(load):
    return load("grpo/one_run")


@pytest.mark.parametrize("method", SETTINGS)
def test_a_run_of_each_method_changes_the_model_and_says_what_it_took(one_run, method, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    folder = write_llama(tmp_path / "tiny")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    seen = []
    load_model = one_run.llm.load
    monkeypatch.setattr(one_run.llm, "load", lambda *a, **k: seen.append(load_model(*a, **k)) or seen[-1])
    # every completion has another score, so that there is something to learn from
    task = one_run.get_task("countdown", shots=1)
    scored = one_run.dataclasses.replace(task, reward=varied, validation=task.validation[:4])
    monkeypatch.setattr(one_run, "get_task", lambda name, shots: scored)
    out = tmp_path / "run.json"
    arguments = ["--method", method, "--model", str(folder), "--setting", json.dumps(SETTINGS[method])]
    arguments += ["--shots", "1", "--max-tokens", "4", "--minutes", "0.0001", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["one_run.py", *arguments])
    one_run.main()
    result = json.loads(out.read_text())
    assert (result["method"], result["steps"], result["completions"]) == (method, 1, {"eggroll": 8, "grpo": 4}[method])
    assert [look["steps"] for look in result["curve"]] == [0, 1]
    assert all(0 <= look["reward"] <= 1 for look in result["curve"])
    assert len(result["train_reward"]) == 1
    assert result["mib_peak"] >= result["mib_before"] > 0
    after = seen[0].model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def varied(prompts, completions, **columns):
    """A number from 0 to 1 that hardly any two completions share."""
    assert {"numbers", "target"} <= columns.keys()
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def test_the_clock_stands_still_while_a_model_is_measured(one_run):
    now = [0.0]

    def measure():
        now[0] += 100.0
        return {"reward": 0.5}

    clock = one_run.Clock(10.0, 2, measure, lambda: now[0])
    clock.look(0.0)
    going = []
    for step in range(1, 5):
        now[0] += 3.0
        going.append(clock.tick(step))
    assert going == [True, True, True, False]
    assert [(look["seconds"], look["steps"]) for look in clock.curve] == [(0.0, 0), (6.0, 2), (12.0, 4)]


def test_the_table_and_the_picture(load, tmp_path, capsys):
    curve = [{"seconds": 0.0, "steps": 0, "reward": 0.04, "format": 0.3, "right": 0.0},
             {"seconds": 60.0, "steps": 9, "reward": 0.09, "format": 0.9, "right": 0.0}]  # fmt: skip
    run = {"seed": 0, "seconds": 60.0, "steps": 9, "completions": 144, "curve": curve, "mib_peak": 2048}
    for method, file in (("eggroll", "countdown-eggroll_cpu_2026-01-01"), ("grpo", "countdown-grpo_cpu_2026-01-01")):
        result = {"chosen": {"lr": 0.1}, "search": [run, {"error": ["no"]}], "runs": [run], "method": method}
        (tmp_path / f"{file}.json").write_text(json.dumps(result))
    load("grpo/compare").plot(tmp_path, "countdown")
    table = capsys.readouterr().out
    assert (
        "| EGGROLL, seed 0 | lr 0.1 | 0.090, failed | 1.0 | 9 | 144 | 0.040 | 0.090 | 0.090 | 0.90 | 0.000 | 2,048 |"
        in table
    )
    assert (tmp_path / "countdown.png").stat().st_size > 5000
    assert (tmp_path / "countdown.md").read_text() == table


def test_grpo_learns_only_from_what_the_model_said_itself(one_run, load, tmp_path):
    """The mask of a conversation: the model's own tokens and its end token, nothing that the world has said."""
    pytest.importorskip("trl", reason="trl is not installed")
    loaded = one_run.llm.load(str(write_llama(tmp_path / "tiny")), dtype="float32")
    task = one_run.get_task("guess_number")
    rows, reward, rollout = load("grpo/conversations").conversing(
        loaded, task, {**one_run.talking(task), "max_length": 2048}, 3, 0
    )
    made = rollout([row["prompt"] for row in rows[1:4]], None)  # this model guesses the first number at once
    assert reward(**made) == made["world_score"]
    for ids, mask, score in zip(made["completion_ids"], made["env_mask"], made["world_score"], strict=True):
        assert len(ids) == len(mask)
        assert mask[0] == 1
        assert 0 in mask
        text = loaded.tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if not own])
        assert "Write one number" in text or "Higher than" in text or "Lower than" in text
        assert 0 < sum(mask) <= 5 * (3 + 1)
        assert 0.0 <= score <= 1.0
