"""Real vLLM on the CPU against the PyTorch evaluator: the same members, the same updates, the same weights."""

import dataclasses

import numpy as np
import pytest
import torch

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.errors import ConfigError, ModelError, RunError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.models import loading
from eggroll.vllm_backend import VllmEggrollTrainer

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three."]
LONG = [("The cat sat on the mat and looked at the dog. " * 8) + end for end in ("Why?", "Who?", "When?")]
CONFIG = EggrollConfig(
    population_size=8, rank=1, sigma=0.05, lr=0.01, generations=5, max_tokens=12, max_length=512,
    prompts_per_generation=4, eval_every=0, seed=3,
)  # fmt: skip


def reward(prompts, completions):
    return [float(sum(map(ord, text)) % 97) for text in completions]


def both(model, config, **options):
    dtype = options.pop("dtype", "float32")
    loaded = loading.load(str(model), dtype=dtype, device="cpu")
    plain = EggrollTrainer(loaded.model, config, reward, loaded.tokenizer)
    return VllmEggrollTrainer(str(model), config, reward, dtype=dtype, **options), plain


@pytest.fixture(scope="module")
def trainers(tiny):
    made, plain = both(tiny, CONFIG, engine_args={"max_lora_rank": 64})  # room for adapters that were saved
    yield made, plain
    made.cleanup()


def completions(trainer, examples, generation, members, sigma):
    """What members write, as token texts, by either trainer."""
    evaluator = trainer.worker.evaluator
    evaluator.choose_mode(examples)
    with evaluator.perturbed(generation, members, sigma) as active:
        return evaluator.complete(examples, active, generation, members)[0]


def of_center(trainer, examples, requests=None):
    """What the center writes, or an adapter."""
    return trainer.worker.evaluator.complete(examples, requests, 0, range(1))[0]


def weights(trainer, name):
    return torch.tensor(trainer.engine.call("eggroll_read", name)[0])


def assert_same_weights(trainer, plain, tolerance=1e-6):
    parameters = dict(plain.model.named_parameters())
    for spec in trainer.evolved:
        assert (weights(trainer, spec.name) - parameters[spec.name].float()).abs().max() <= tolerance, spec.name


@pytest.mark.parametrize("prompts", [PROMPTS, LONG], ids=["short", "long"])
def test_members_write_what_the_pytorch_evaluator_says(trainers, prompts):
    """The long prompts fill several blocks of the prefix cache, which members must not share."""
    made, plain = trainers
    examples = load_examples(prompts)
    mine, theirs = (completions(trainer, examples, 2, range(8), 0.05) for trainer in (made, plain))
    equal = [a == b for a, b in zip(mine, theirs, strict=True)]
    assert np.mean(equal) >= 0.95
    assert len(set(mine)) > len(prompts)  # members differ
    assert completions(made, examples, 2, range(8), 0.05) == mine  # and now from the cache
    assert of_center(made, examples) == of_center(plain, examples)


def test_an_engine_goes_on_after_an_interrupt(trainers, monkeypatch):
    """Requests that Ctrl-C left unfinished would be among the answers of the next call."""
    made, _ = trainers
    examples = load_examples(PROMPTS)
    expected = made.worker.evaluator.evaluate(7, 0.05, examples).fitness
    engine, calls = made.engine.llm.llm_engine, []
    step = engine.step

    def interrupted():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.worker.evaluator.evaluate(7, 0.05, examples)
    assert not engine.has_unfinished_requests()
    monkeypatch.undo()
    assert (made.worker.evaluator.evaluate(7, 0.05, examples).fitness == expected).all()


@pytest.mark.slow
@pytest.mark.model
def test_members_of_a_real_model_write_the_same_and_learn_the_same():
    config = dataclasses.replace(CONFIG, sigma=0.01, lr=0.001, generations=2, max_tokens=24)
    made, plain = both("smollm2-135m", config)
    try:
        mine, theirs = (completions(t, load_examples(PROMPTS), 0, range(8), 0.01) for t in (made, plain))
        assert np.mean([a == b for a, b in zip(mine, theirs, strict=True)]) >= 0.95
        assert len(set(mine)) > 2 * len(PROMPTS)
        made.evolve(prompts=PROMPTS)
        plain.evolve(PROMPTS)
        assert_same_weights(made, plain)
    finally:
        made.cleanup()


def test_five_generations_give_the_same_weights_everywhere(trainers, tmp_path):
    made, plain = trainers
    mine = made.evolve(prompts=PROMPTS, eval_data=["What is blue?"])
    theirs = plain.evolve(PROMPTS, eval_data=["What is blue?"])
    assert [line["fitness_mean"] for line in mine] == [line["fitness_mean"] for line in theirs]
    assert mine[-1]["heldout_reward"] == theirs[-1]["heldout_reward"]
    assert_same_weights(made, plain)
    saved = loading.load(str(made.save(tmp_path / "saved")), dtype="float32", device="cpu").model
    parameters = dict(saved.named_parameters())
    for spec in made.evolved:
        assert (weights(made, spec.name) - parameters[spec.name]).abs().max() <= 1e-6
    # the engine writes with its new weights what the saved model writes
    examples = load_examples(LONG)
    assert of_center(made, examples) == of_center(plain, examples)


def test_the_adapter_is_the_change_and_says_what_it_loses(trainers, tmp_path):
    """After the test above: an adapter of full rank is the merged model; a small one says its error."""
    made, _ = trainers
    from safetensors.torch import load_file

    report = made.save_best_adapter(tmp_path / "full", rank=96)
    assert report.relative_error < 1e-6
    factors = load_file(tmp_path / "full" / "adapter_model.safetensors")
    merged = dict(loading.load(str(tmp_path / "full" / "merged"), dtype="float32").model.named_parameters())
    base = dict(made.worker.setup.load_base().named_parameters())
    for spec in made.evolved:
        module = f"base_model.model.{spec.name.removesuffix('.weight')}"
        change = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(base[spec.name] + change, merged[spec.name], atol=2e-6, rtol=0)
    small = made.save_best_adapter(tmp_path / "small", rank=2, merged=False)
    assert 0.05 < small.relative_error < 1
    assert small.full_rank > 2
    assert not (tmp_path / "small" / "merged").exists()
    member = made.save_best_adapter(tmp_path / "member", of="member", rank=96, merged=False)
    assert member.relative_error < 1e-6


def test_an_adapter_that_was_saved_is_served_by_vllm(trainers, tmp_path):
    """The file is one that vLLM loads like any other: its answers are those of the merged model."""
    from vllm.lora.request import LoRARequest

    made, plain = trainers
    examples = load_examples(PROMPTS)
    wanted = of_center(plain, examples)
    before = made.engine.state_tensors()
    made.save_best_adapter(tmp_path / "adapter", rank=64, merged=False)  # 64 is the full rank of every matrix
    base = dict(made.worker.setup.load_base().named_parameters())
    request = LoRARequest("saved", 2**20 + 5, str(tmp_path / "adapter"))

    try:
        made.engine.load_state_tensors({**before, **{f"parameter/{s.name}": base[s.name] for s in made.evolved}})
        assert of_center(made, examples) != wanted
        assert of_center(made, examples, [request]) == wanted
    finally:
        made.engine.load_state_tensors(before)
    assert of_center(made, examples) == wanted


def test_nothing_to_save_yet(trainers, monkeypatch, tmp_path):
    made, _ = trainers
    monkeypatch.setattr(made, "done", 0)
    with pytest.raises(RunError, match="no generation has been run"):
        made.save_best_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"rank": 4, "target_modules": ("q_proj.weight", "v_proj.weight", "down_proj"), "optimizer": "sgd", "lr": 0.5},
         "float32"),
        ({"rank": 3, "sampling": "one_sided", "noise_reuse": 2, "temperature": 0.7}, "float32"),
        ({"rank": 1, "optimizer": "momentum", "lr": 0.2, "samples_per_prompt": 3, "pass_at": 2, "temperature": 1.0},
         "bfloat16"),
    ],
    ids=["some modules", "one-sided", "16 bit, pass at 2"],
)  # fmt: skip
def test_updates_are_those_of_the_pytorch_replica(tiny, changes, dtype):
    """Whatever was scored (sampled texts differ between engines): the same records make the same weights."""
    config = dataclasses.replace(CONFIG, generations=2, **changes)
    made, plain = both(tiny, config, dtype=dtype)
    with made:
        examples = load_examples(PROMPTS)
        scores = made.worker.evaluator.evaluate(0, config.sigma, examples)
        assert scores.fitness.shape == (8, 4)
        assert len(np.unique(scores.fitness)) > 4
        made.evolve(prompts=PROMPTS)
        for record in made.engine.records:
            plain.worker.learner.apply(record)
        assert_same_weights(made, plain)
        untouched = "model.layers.1.self_attn.k_proj.weight"
        if config.target_modules is not None:
            assert untouched not in {spec.name for spec in made.evolved}
            layer = made.engine.llm.llm_engine.model_executor.driver_worker.worker.eggroll_groups
            rows, part = layer.layer_and_part("model.layers.1.self_attn.q_proj.weight")
            base = rows.base_layer
            fused = base.quant_method.apply(base, torch.eye(rows.input_size), None).T
            mine = fused[part.stop : part.stop + 64]
            torch.testing.assert_close(mine, dict(plain.model.named_parameters())[untouched], atol=1e-6, rtol=0)


def test_tokenized_batches_are_refused(trainers):
    made, _ = trainers
    with pytest.raises(ConfigError, match="takes prompts"):
        made.evolve([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])


def test_an_engine_that_fails_says_so(trainers, monkeypatch):
    made, _ = trainers

    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(made.engine.llm, "generate", broken)
    with pytest.raises(ModelError, match=r"engine died while it generated.*illegal memory access.*--resume"):
        made.worker.evaluator.evaluate(9, 0.05, load_examples(PROMPTS))
