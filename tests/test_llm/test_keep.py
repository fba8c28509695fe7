"""The trainer's ``keep`` and ``patience``: whose weights the model has in the end."""

import json

import pytest
import torch

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.errors import ConfigError
from eggroll.loop import Heldout
from eggroll.run.run_dir import RunDir

PROMPTS = ["the cat", "a dog"]
SCORES = [0.1, 0.5, 0.9, 0.3, 0.2]


def trainer_of(model, tokenizer, scores=SCORES):
    settings = EggrollConfig(
        population_size=4, rank=2, sigma=0.05, lr=0.02, generations=4, max_tokens=4, prompts_per_generation=2,
        eval_every=1, checkpoint_every=0,
    )  # fmt: skip
    trainer = EggrollTrainer(model, settings, lambda text: float(sum(map(ord, text)) % 97), tokenizer)
    trainer.worker.heldout = lambda generation: Heldout(scores[generation])
    return trainer


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_the_best_generation_is_left_in_the_model(build_model, tiny_tokenizer, tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    trainer = trainer_of(build_model("llama"), tiny_tokenizer)
    trainer.evolve(PROMPTS, eval_data=PROMPTS, run=run, keep="best")
    other, last = (trainer_of(build_model("llama"), tiny_tokenizer) for _ in range(2))
    other.evolve(PROMPTS, callback=lambda metrics: metrics["generation"] < 2)
    last.evolve(PROMPTS, eval_data=PROMPTS)
    assert same(trainer.model, other.model)
    assert not same(trainer.model, last.model)
    assert (trainer.done, trainer.kept.saved, len(trainer.history)) == (2, "best", 4)
    assert (last.done, last.kept.saved) == (4, "last")
    trainer.save(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "eggroll.json").read_text())
    assert about["kept"] == "best 0.9000 at generation 2, last 0.2000 at 4; saved: best"
    assert run.latest_checkpoint().generation == 4


def test_a_resumed_trainer_goes_on_from_the_last_generation(build_model, tiny_tokenizer, tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    first = trainer_of(build_model("llama"), tiny_tokenizer)
    first.evolve(PROMPTS, eval_data=PROMPTS, run=run, keep="best", callback=lambda metrics: metrics["generation"] < 3)
    assert first.done == 2
    second, whole = (trainer_of(build_model("llama"), tiny_tokenizer) for _ in range(2))
    second.evolve(PROMPTS, eval_data=PROMPTS, run=run, resume=True)
    whole.evolve(PROMPTS, eval_data=PROMPTS)
    assert same(second.model, whole.model)
    assert second.kept.standing == whole.kept.standing


def test_patience_ends_the_run(build_model, tiny_tokenizer):
    trainer = trainer_of(build_model("llama"), tiny_tokenizer, [0.5, 0.4, 0.3, 0.2, 0.1])
    with pytest.warns(UserWarning, match="stopped early after generation 2"):
        trainer.evolve(PROMPTS, eval_data=PROMPTS, patience=2)
    assert trainer.done == 2
    assert trainer.kept.stopped_early


def test_what_is_missing(build_model, tiny_tokenizer):
    trainer = trainer_of(build_model("llama"), tiny_tokenizer)
    with pytest.raises(ConfigError, match="there are none: give eval_data"):
        trainer.evolve(PROMPTS, keep="best")
    with pytest.raises(ConfigError, match="there are no held-out data"):
        trainer.evolve(PROMPTS, patience=2)
