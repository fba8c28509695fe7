"""The three tasks that defaults are measured on: graded scores, prompts that are apart; and the script's table."""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks" / "defaults"
TASKS = ("json_object", "three_items", "one_question")
FROM_WORST_TO_BEST = {
    "json_object": [
        "A fox is a small animal.",
        'Here it is:\n\n{"name": "fox", "color": "red", "size": "small"}\n\nThese are the keys that were asked for.',
        '{"name": "fox", "color": "red", "size": "small", "legs": 4, "tail": "long"}',
        '```json\n{"name": "fox", "color": "red", "size": "small"}\n```',
    ],
    "three_items": [
        "Apples are a good example of a fruit, as they grow on trees.",
        "1. Apples, which grow on trees in many countries\n2. Pears\n3. Plums\n4. Figs\n5. Plums",
        "1. Apples\n2. Pears\n3. Plums\n4. Figs",
        "- Apples\n- Pears\n- Plums",
    ],
    "one_question": [
        "That is nice to hear, and bread is a very good thing to bake in the morning if there is time.",
        "That is nice. What kind of bread did you bake this morning, and how long did it take? I like bread.",
        "That is nice. What kind of bread is it?",
        "What kind of bread did you bake?",
    ],
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_graded(task):
    score = load(HERE / task / "score.py").score
    found = [score(text) for text in FROM_WORST_TO_BEST[task]]
    assert found == sorted(set(found))
    assert found[0] < 0.3
    assert found[-1] == 1
    assert all(score(text) == 0 for text in ("", "  \n"))
    assert all(0 <= score(text) <= 0.5 for text in ("? ? ?", "{}", "- \n- \n-", "a a a a a a a a?", '{"name": ', "}{"))


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_are_others(task):
    train, heldout = (
        [json.loads(line)["prompt"] for line in (HERE / task / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    assert (len(set(train)), len(set(heldout))) == (40, 24)
    assert not set(train) & set(heldout)


def written(folder, task, seed, before, after):
    """What a finished run leaves, as far as the table reads it."""
    directory = folder / f"{task}-{seed}"
    directory.mkdir()
    settings = {"sigma": 0.01, "lr": 0.1, "lr_schedule": "linear", "generations": 9}
    options = {**settings, "population_size": 16, "prompts_per_generation": 4, "seed": seed}
    metrics = [{"generation": 0, "heldout_reward": before}, {"generation": 9, "heldout_reward": after}]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    (directory / "config.json").write_text(json.dumps({"options": options}))
    (directory / "environment.json").write_text(json.dumps({"chosen": {"lines": ["sigma 0.01"]}}))
    (directory / "wall_s.json").write_text("361.2")
    (directory / "report.html").write_text("")
    return directory


def test_the_table_of_finished_runs(tmp_path, monkeypatch):
    """They are not repeated: a command that ran would fail the test."""
    script = load(HERE / "run.py")
    monkeypatch.setattr(script, "command", None)
    after = {"json_object": 0.9, "three_items": 0.6, "one_question": 0.45}
    for task, value in after.items():
        for seed in (0, 1):
            written(tmp_path, task, seed, 0.25, value + seed / 100)
    given = ["run.py", "--folder", str(tmp_path), "--seeds", "0", "1", "--results", str(tmp_path / "results")]
    monkeypatch.setattr(script.sys, "argv", given)
    script.main()
    (path,) = (tmp_path / "results").glob("*.json")
    found = json.loads(path.read_text())
    assert {task: one["reached"] for task, one in found["summary"].items()} == {
        "json_object": True, "three_items": True, "one_question": False,
    }  # fmt: skip
    assert found["runs"][0]["part_of_distance_to_best"] == round(0.65 / 0.75, 3)
    rows = path.with_suffix(".md").read_text().splitlines()
    assert rows[2] == "| json_object | 0 | 0.250 | 0.900 | 87% | 0.01 | 0.1 | 9 | 16 x 4 | 361 |"
    assert len(rows) == 2 + 6


def test_the_command_has_no_setting_of_the_algorithm(tmp_path):
    words = load(HERE / "run.py").command("three_items", 1, tmp_path, 6, "smollm2-135m")
    flags = [word for word in words if word.startswith("-")]
    assert flags == ["-r", "-d", "--eval-prompts", "--minutes", "--seed", "-o"]
