"""``TorchWorker`` and ``evolve``, with workers in this process."""

import pytest
import torch

from eggroll.distributed import TorchWorker, evolve
from eggroll.errors import CheckpointError, ConfigError, RewardError, RunError
from eggroll.run.run_dir import RunDir


def test_a_network_learns_and_its_weights_come_back(toys):
    settings = toys.config(generations=30)
    found = evolve(toys.factory(settings), settings, local=True, workers=2, heldout=True, eval_every=30)
    assert not found.interrupted
    assert found.history[-1]["heldout_reward"] > toys.heldout(toys.make_model()) + 0.3
    model = toys.make_model()
    missing = model.load_state_dict(found.parameters, strict=False)
    assert missing.missing_keys == ["0.bias", "2.bias"], "matrices are evolved, unless kinds= says otherwise"
    assert toys.heldout(model) == pytest.approx(found.history[-1]["heldout_reward"])


def test_scores_are_those_of_the_population(toys):
    settings = toys.config()
    worker = toys.factory(settings)()
    found = worker.evaluate(3, 0.1, range(8, 16)).fitness
    population = TorchWorker(toys.make_model, toys.fitness, settings).replica.population
    expected = population.scores(lambda active: toys.fitness(population.model, active, 3), 3, sigma=0.1)[8:16]
    assert found == pytest.approx(expected.numpy(), abs=1e-6)


def test_all_kinds_of_parameters(toys):
    worker = TorchWorker(toys.make_model, toys.fitness, toys.config(), kinds=("matrix", "vector"))
    assert {name.split("/")[1] for name in worker.state_tensors()} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_one_score_for_each_member_and_prompt(toys):
    worker = TorchWorker(toys.make_model, lambda model, active, _: torch.ones(active.members, 3), toys.config())
    assert worker.evaluate(0, 0.1, range(4)).fitness.shape == (4, 3)


@pytest.mark.parametrize(
    ("scores", "given"),
    [
        (lambda active: torch.zeros(3), r"float32 \(3,\)"),
        (lambda active: 1.0, r"returned 1\.0"),
        (lambda active: ["a"] * active.members, r"<U1 \(4,\)"),
    ],
)
def test_wrong_scores_are_told(toys, scores, given):
    worker = TorchWorker(toys.make_model, lambda model, active, _: scores(active), toys.config())
    with pytest.raises(RewardError, match=rf"fitness_fn must return \(4,\) scores, one for each member.*{given}"):
        worker.evaluate(0, 0.1, range(4))


def test_heldout_needs_its_function(toys):
    with pytest.raises(ConfigError, match="held-out scores need heldout_fn"):
        TorchWorker(toys.make_model, toys.fitness, toys.config()).heldout(0)


def test_a_run_is_continued_and_a_wrong_one_refused(toys, tmp_path):
    settings, shorter = toys.config(optimizer="adam"), toys.config(optimizer="adam", generations=6)
    whole = evolve(toys.factory(settings), settings, local=True)
    evolve(toys.factory(settings), shorter, local=True, run=tmp_path / "run", checkpoint_every=4)
    found = evolve(toys.factory(settings), settings, local=True, run=tmp_path / "run", resume=True, workers=3)
    assert all(torch.equal(found.state[name], whole.state[name]) for name in whole.state)
    with pytest.raises(RunError, match="already holds a run"):
        evolve(toys.factory(settings), settings, local=True, run=tmp_path / "run")
    with pytest.raises(RunError, match="optimizer"):
        evolve(toys.factory(settings), toys.config(), local=True, run=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        evolve(toys.factory(settings, width=8), settings, local=True, run=RunDir.open(tmp_path / "run"), resume=True)


def test_a_pool_logs_how_far_updates_agree_as_one_worker_does(toys):
    settings = toys.config(generations=4)
    alone = evolve(toys.factory(settings), settings, local=True).history
    many = evolve(toys.factory(settings), settings, local=True, workers=2).history
    cosines = [[line.get("update_cosine") for line in history] for history in (alone, many)]
    assert cosines[0] == cosines[1]
    assert cosines[0][0] is None
    assert all(-1 <= cosine <= 1 for cosine in cosines[0][1:])


def test_listeners_and_a_callback(toys):
    class Listener:
        def __init__(self):
            self.told, self.seen = [], []

        def generation(self, metrics):
            self.seen.append(metrics["generation"])

        def message(self, text):
            self.told.append(text)

    listener, settings = Listener(), toys.config(population_size=4)
    evolve(
        toys.NumpyWorker, settings, local=True, workers=3, listeners=[listener], callback=lambda m: m["generation"] < 3
    )
    assert listener.seen == [1, 2, 3]
    assert listener.told[0].startswith("3 workers share 2 ranges")
