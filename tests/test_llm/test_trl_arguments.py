"""TRL's own arguments of reward functions: the trainer's state, and two ways to log."""

import math

import pytest
from tiny_models import write_llama

from eggroll import EggrollConfig, EggrollTrainer, FunctionReward, MultiReward, TextReward
from eggroll.distributed import LocalPool
from eggroll.errors import RewardError
from eggroll.run.run_dir import RunDir

CONFIG = EggrollConfig(
    population_size=4, rank=1, generations=2, max_tokens=2, prompts_per_generation=2, samples_per_generation=2,
    eval_every=1,
)  # fmt: skip
STEPS = []


def reward(prompts, completions, answer, trainer_state, log_extra, log_metric=None, **kwargs):
    """As such functions are written for TRL."""
    STEPS.append((trainer_state.global_step, trainer_state.max_steps))
    found = [completion + "!" for completion in completions]
    log_extra("extracted", found)
    log_metric("length", sum(map(len, completions)) / len(completions))
    return [float(len(completion)) for completion in completions]


def by_double_star(completions, **kwargs):
    """Another way in which they are written."""
    kwargs["log_metric"]("step", kwargs["trainer_state"].global_step)
    kwargs.get("log_extra")("position", list(range(len(completions))))
    return [float(len(ids)) for ids in kwargs["completion_ids"]]


def test_a_trl_function_runs_unmodified_and_logs_to_the_run(tmp_path, tiny_model, tiny_tokenizer):
    STEPS.clear()
    data = [{"prompt": f"p{index}", "answer": "4"} for index in range(4)]
    run = RunDir.create(tmp_path / "run", CONFIG.to_dict())
    other = FunctionReward(by_double_star, tokenizer=tiny_tokenizer)
    mixture = MultiReward([(FunctionReward(reward), 1.0), (other, 0.0)])
    EggrollTrainer(tiny_model, CONFIG, mixture, tiny_tokenizer).evolve(data, eval_data=data, run=run)
    assert sorted(STEPS) == STEPS
    assert set(STEPS) == {(0, 2), (1, 2), (2, 2)}
    start, first, last = run.metrics()
    assert start["heldout_rewards/step"] == 0.0
    assert (first["rewards/step"], first["heldout_rewards/step"]) == (0.0, 1.0)
    assert (last["rewards/step"], last["heldout_rewards/step"]) == (1.0, 2.0)
    assert first["rewards/length"] == pytest.approx(first["fitness_mean"])
    samples = run.samples()
    assert len(samples) == 4 * 3 + 2 * 2
    assert all(row["logged"]["extracted"] == row["completion"] + "!" for row in samples)
    assert {row["logged"]["position"] for row in samples if row["split"] == "heldout"} == {0, 1, 2, 3}
    assert all(row["logged"]["reward"] == row["reward"] == len(row["completion"]) for row in samples), "its parts"


def test_the_scores_of_several_functions_are_with_the_samples(tmp_path, tiny_model, tiny_tokenizer):
    def length(completions):
        return [float(len(completion)) for completion in completions]

    def vowels(completions):
        return [None if not completion else float(sum(map(completion.count, "aeiou"))) for completion in completions]

    run = RunDir.create(tmp_path / "run", CONFIG.to_dict())
    both = FunctionReward([length, vowels], weights=[1.0, 0.5])
    EggrollTrainer(tiny_model, CONFIG, both, tiny_tokenizer).evolve(["a", "b"], eval_data=["c"], run=run)
    samples = run.samples()
    assert {row["split"] for row in samples} == {"train", "heldout"}
    for row in samples:
        logged = row["logged"]
        assert logged["length"] == len(row["completion"])
        assert row["reward"] == pytest.approx(logged["length"] + 0.5 * (logged["vowels"] or 0.0))


def test_workers_log_too(tmp_path, monkeypatch):
    monkeypatch.setattr("eggroll.llm.backends.pool.RayPool", LocalPool)
    model = str(write_llama(tmp_path / "tiny"))
    with EggrollTrainer.from_model_id(model, CONFIG, by_double_star, workers=2, dtype="float32") as trainer:
        history = trainer.evolve(["a", "b"])
    assert [line["rewards/step"] for line in history] == [0.0, 1.0]


def test_a_score_of_one_text_may_log(tiny_model, tiny_tokenizer):
    def score(text, log_metric, trainer_state):
        log_metric("twice", 2.0 * len(text) + trainer_state.max_steps)
        return len(text)

    trainer = EggrollTrainer(tiny_model, CONFIG, TextReward(scorer=score), tiny_tokenizer)
    for line in trainer.evolve(["a", "b"]):
        assert line["rewards/twice"] == pytest.approx(2 * line["fitness_mean"] + 2)


def test_a_missing_column_is_named_also_with_a_double_star():
    with pytest.raises(RewardError, match=r"'reward' asks for answer; there are target, prompts, completions. Add the"):
        FunctionReward(reward).score(["p"], ["x"], {"target": ["4"]})

    def kept(completions, environments, /, *, weight=1.0, **kwargs):
        return [1.0]

    with pytest.raises(RewardError, match="'kept' asks for environments; there are prompts, completions"):
        FunctionReward(kept).score(["p"], ["x"])


def test_positional_only_parameters():
    def kept(prompts, completions, /, **columns):
        return [float(len(completion)) for completion in completions]

    assert FunctionReward(kept).score(["p"], ["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda log_extra, _: log_extra("c", [1, 2, 3]), r"log_extra\('c', values\) got 3 values for 2 completions"),
        (lambda _, log_metric: log_metric("m", "high"), r"log_metric\('m', value\) returned the text 'high'"),
    ],
)
def test_wrong_use_of_the_log(call, text):
    def wrong(completions, log_extra, log_metric):
        call(log_extra, log_metric)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=text):
        FunctionReward(wrong).score(["p", "q"], ["x", "y"])


def test_what_json_cannot_hold_is_logged_as_text(tmp_path, tiny_model, tiny_tokenizer):
    class Odd:
        def __repr__(self):
            return "<odd>"

    def logs(completions, log_extra, log_metric):
        log_extra("odd", [Odd() for _ in completions])
        log_extra("list", [[1, "a"] for _ in completions])
        log_metric("nothing", math.nan)
        return [float(len(text)) for text in completions]

    run = RunDir.create(tmp_path / "run", CONFIG.to_dict())
    EggrollTrainer(tiny_model, CONFIG, FunctionReward(logs), tiny_tokenizer).evolve(["a"], run=run)
    assert run.samples()[0]["logged"] == {"odd": "Odd <odd>", "list": [1, "a"]}
    assert run.metrics()[0]["rewards/nothing"] is None
