"""One engine in two processes (tensor parallelism), on the CPU, against the PyTorch evaluator."""

import dataclasses

import numpy as np
import psutil
import pytest
import torch

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.errors import EngineDiedError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.models import loading
from eggroll.vllm_backend import VllmEggrollTrainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # three processes, each of which loads vLLM

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three."]
CONFIG = EggrollConfig(
    population_size=8, rank=2, sigma=0.05, lr=0.01, generations=3, max_tokens=12, max_length=128,
    prompts_per_generation=4, eval_every=0, seed=3,
)  # fmt: skip
ROWS_CUT = ("o_proj", "down_proj")
"""Layers whose inputs are shared out, and not their outputs."""


def reward(prompts, completions):
    return [float(sum(map(ord, text)) % 97) for text in completions]


def completions(trainer, examples):
    """What all members of generation 2 write, by either backend."""
    evaluator = trainer.worker.evaluator
    evaluator.choose_mode(examples)
    with evaluator.perturbed(2, range(8), 0.05) as active:
        return evaluator.complete(examples, active, 2, range(8))[0]


def weights(trainer, name):
    """A whole weight, of the parts that the processes multiply with."""
    parts = [torch.tensor(part) for part in trainer.engine.call("eggroll_read", name)]
    assert len(parts) == 2
    return torch.cat(parts, dim=1 if name.split(".")[-2] in ROWS_CUT else 0)


def assert_same_weights(trainer, plain):
    parameters = dict(plain.model.named_parameters())
    for spec in trainer.evolved:
        torch.testing.assert_close(
            weights(trainer, spec.name), parameters[spec.name].float(), atol=1e-6, rtol=0, msg=spec.name
        )


@pytest.fixture(scope="module")
def trainers(tiny):
    loaded = loading.load(str(tiny), dtype="float32", device="cpu")
    plain = EggrollTrainer(loaded.model, CONFIG, reward, loaded.tokenizer)
    made = VllmEggrollTrainer(str(tiny), CONFIG, reward, dtype="float32", engine_args={"tensor_parallel_size": 2})
    yield made, plain
    made.cleanup()


def test_members_write_and_learn_what_the_pytorch_replica_does(trainers):
    made, plain = trainers
    examples = load_examples(PROMPTS)
    mine, theirs = (completions(trainer, examples) for trainer in trainers)
    assert np.mean([a == b for a, b in zip(mine, theirs, strict=True)]) >= 0.95
    assert len(set(mine)) > len(PROMPTS)
    assert_same_weights(made, plain)
    made.evolve(prompts=PROMPTS)
    assert len(made.engine.records) == CONFIG.generations
    for record in made.engine.records:
        plain.worker.learner.apply(record)
    assert_same_weights(made, plain)
    mine, theirs = (trainer.worker.evaluator.complete(examples, None, 0, range(1))[0] for trainer in trainers)
    assert mine == theirs


def test_a_state_is_put_back_into_all_parts(trainers, tiny):
    """After the test above: the first process reads the file, the other gets it from there."""
    made, plain = trainers
    before = made.engine.state_tensors()
    base = dict(made.worker.setup.load_base().named_parameters())
    made.engine.load_state_tensors({**before, **{f"parameter/{spec.name}": base[spec.name] for spec in made.evolved}})
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(weights(made, name), base[name], atol=1e-6, rtol=0)
    made.engine.load_state_tensors(before)
    assert_same_weights(made, plain)
    assert all(value.equal(before[key]) for key, value in made.engine.state_tensors().items())


def test_bfloat16_with_its_masters(tiny):
    config = dataclasses.replace(CONFIG, generations=1, optimizer="sgd", lr=0.5)
    loaded = loading.load(str(tiny), dtype="bfloat16", device="cpu")
    plain = EggrollTrainer(loaded.model, config, reward, loaded.tokenizer)
    engine = {"tensor_parallel_size": 2}
    with VllmEggrollTrainer(str(tiny), config, reward, dtype="bfloat16", engine_args=engine) as made:
        made.evolve(prompts=PROMPTS)
        plain.worker.learner.apply(made.engine.records[0])
        assert_same_weights(made, plain)
        made.engine.load_state_tensors(made.engine.state_tensors())
        assert_same_weights(made, plain)


def test_an_engine_that_lost_a_process_is_dead(trainers):
    """The last test of this engine."""
    made, _ = trainers
    (part,) = [child for child in psutil.Process().children(recursive=True) if "Worker_TP1" in child.name()]
    part.kill()
    with pytest.raises(EngineDiedError, match=r"the vLLM engine died .*continue it with --resume"):
        made.worker.evaluator.evaluate(9, 0.05, load_examples(PROMPTS))
