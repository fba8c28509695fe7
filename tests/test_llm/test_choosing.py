"""What is chosen of a few evaluations: sigma, the learning rate, and how much fits into a time."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from eggroll.core.config import ESConfig
from eggroll.llm.choosing.auto import automatic, with_stand_ins
from eggroll.llm.choosing.budget import Amount, fit
from eggroll.llm.choosing.calibrate import calibrate, components, scores_of, starting_sigma
from eggroll.llm.choosing.choose import choose
from eggroll.llm.choosing.step import estimate_size, learning_rate, relative_step
from eggroll.llm.options import TuneOptions
from eggroll.loop import Evaluation
from eggroll.torch import Replica

PROMPTS, MEMBERS, BREAKS = 8, 16, 0.03


def world(*, scale=1.0, center=0.6, broken=0.1, breaks=BREAKS, spread=12.0, noise=0.02):
    """A score that rises or falls with sigma for each member, and falls to ``broken`` around ``breaks``."""
    random = np.random.default_rng(1)
    effect, private = random.standard_normal(MEMBERS // 2), random.standard_normal((MEMBERS, PROMPTS))

    def evaluate(sigma, members):
        whole = math.exp(-((sigma / breaks) ** 2))
        rows = []
        for member in members:
            own = spread * sigma * effect[member // 2] * (1 if member % 2 == 0 else -1)
            rows.append(broken + whole * (center - broken + own + noise * private[member] * min(1, sigma / 0.01)))
        return Evaluation(scale * np.asarray(rows))

    return evaluate


@pytest.mark.parametrize("start", [0.005, 0.01, 0.08])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_half_of_the_largest_sigma_at_which_members_behave(start, scale):
    """Whatever the score's unit, and from wherever the search begins."""
    found = calibrate(world(scale=scale), MEMBERS, start)
    lost = [(found.center - level.mean) / (found.center - found.broken) for level in found.levels]
    sigmas = [level.sigma for level in found.levels]
    assert found.sigma == pytest.approx(0.01)
    assert lost[sigmas.index(2 * found.sigma)] <= 0.5 < lost[sigmas.index(4 * found.sigma)]
    assert found.chosen.sigma == found.sigma
    assert found.reason.startswith("members at 0.02 score ")
    assert found.center == pytest.approx(0.6 * scale, rel=1e-3)
    assert found.levels[-1].members == (4 if lost[-1] > 0.75 else MEMBERS)
    assert f"of the way down from the model ({found.center:.3g}) to broken text" in found.reason
    assert found.reason.endswith("; the limit is 50%")
    assert not found.warning


def test_members_that_lose_far_more_than_they_differ_by_do_not_behave():
    """A likelihood has much to lose, and its members' scores differ by little."""
    found = calibrate(world(center=-3.0, broken=-20.0, spread=20.0), MEMBERS, 0.02)
    level = found.chosen
    assert found.sigma < 0.01
    assert found.center - level.mean <= 4 * level.deviation
    assert found.center - level.mean < 0.1 * (found.center - found.broken)


def test_scores_of_zero_everywhere():
    found = calibrate(lambda sigma, members: Evaluation(np.zeros((len(members), PROMPTS))), MEMBERS, 0.01)
    assert found.sigma == 0.01
    assert "all members score the same (0) at every sigma that was tried" in found.warning
    nothing = calibrate(lambda sigma, members: Evaluation(np.full((len(members), PROMPTS), np.nan)), MEMBERS, 0.01)
    assert "the score returned None or NaN for all of them" in nothing.warning


def test_a_sigma_that_makes_scores_differ_is_taken_where_the_start_does_not():
    def evaluate(sigma, members):
        scores = np.zeros((len(members), PROMPTS))
        if 0.015 < sigma < 0.05:
            scores[0, 0] = 1.0
        return Evaluation(scores)

    assert calibrate(evaluate, MEMBERS, 0.01).sigma == 0.02


def test_nonsense_that_scores_better_is_said():
    found = calibrate(world(center=0.1, broken=0.9), MEMBERS, 0.01)
    assert found.sigma == 0.01
    assert found.warning.startswith("broken text scores 0.9, more than the model's own answers (0.1)")


def test_noise_between_prompts_is_said():
    found = calibrate(world(spread=0.1, noise=0.5, center=30.0), MEMBERS, 0.01)
    assert "the scores' noise between prompts is" in found.warning


def test_a_given_sigma_is_only_measured():
    found = calibrate(world(), MEMBERS, 0.013, only_start=True, clock=itertools.count().__next__)
    assert (found.sigma, len(found.levels)) == (0.013, 1)
    assert found.chosen.seconds == 2 / MEMBERS


def test_little_time_is_kept_to():
    """A second for each member here: the first sigma takes 8 of them, and no larger one is tried."""
    now, free = [0.0], world()

    def evaluate(sigma, members):
        now[0] += len(members)
        return free(sigma, members)

    found = calibrate(evaluate, MEMBERS, 0.005, seconds=6.0, clock=lambda: now[0])
    assert [(level.sigma, level.members) for level in found.levels] == [(0.005, 8)]
    assert found.sigma == 0.005
    assert found.seconds == 2 + 2 + 8
    found = calibrate(evaluate, MEMBERS, 0.005, seconds=18.0, clock=lambda: now[0])
    assert [(level.sigma, level.members) for level in found.levels] == [(0.005, 14)]
    found = calibrate(evaluate, MEMBERS, 0.005, seconds=25.0, clock=lambda: now[0])
    assert [(level.sigma, level.members) for level in found.levels] == [(0.005, 16), (0.01, 8)]
    assert found.sigma == 0.005


def test_the_components_are_those_of_the_layout():
    random = np.random.default_rng(0)
    pairs, prompts, between, within = 4000, 5, 0.3, 0.8
    half = between * random.standard_normal((pairs, 1)) + within * random.standard_normal((pairs, prompts))
    scores = np.empty((2 * pairs, prompts))
    scores[0::2], scores[1::2] = 1 + half, 1 - half
    found = components(scores)
    assert found == pytest.approx((between, within / math.sqrt(prompts)), rel=0.05)
    assert components(scores[:, :1])[1] == 0


def test_scores_that_are_no_numbers_are_the_worst():
    assert scores_of(Evaluation(np.array([1.0, np.nan, 3.0, -np.inf]))).ravel().tolist() == [1, 1, 3, 1]


def test_the_start_is_a_quarter_of_a_weight():
    assert starting_sigma([(576, 576), (1536, 576)]) == 0.01
    assert starting_sigma([(4096, 4096)]) == 0.004
    assert starting_sigma([]) == 0.01


SETTINGS = [
    {"population_size": 32},
    {"population_size": 128, "rank": 4, "fitness_shaping": "normalized"},
    {"population_size": 64, "sampling": "one_sided"},
    {"population_size": 64, "fitness_shaping": "raw"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_first_step_has_the_size_that_the_rule_says(settings):
    """Against the real update of a module, for scores that are independent."""
    import torch

    config = ESConfig(sigma=0.02, lr=1.0, optimizer="sgd", generations=10, **settings)
    lr = learning_rate(config, deviation=3.0)
    random, ratios = np.random.default_rng(5), []
    for seed in range(6):
        module = torch.nn.Linear(64, 64, bias=False)
        replica = Replica(module, ESConfig(**(config.to_dict() | {"lr": lr, "seed": seed})))
        before = module.weight.detach().clone()
        replica.tell(0, 3.0 * random.standard_normal(config.population_size))
        step = (module.weight - before).detach().pow(2).mean().sqrt()
        ratios.append(float(step) / (relative_step(config) * config.sigma))
    assert np.sqrt(np.mean(np.square(ratios))) == pytest.approx(1.0, abs=0.12)


def test_the_step_follows_optimizer_length_and_decay():
    long = ESConfig(population_size=32, generations=100, lr_schedule="constant")
    assert relative_step(long) == pytest.approx(0.15)
    assert relative_step(ESConfig(generations=100, lr_schedule="linear")) > relative_step(long)
    assert relative_step(ESConfig(generations=2)) == 0.5
    assert relative_step(ESConfig(generations=0)) == 0.5
    assert relative_step(ESConfig(generations=100, noise_reuse=4)) == pytest.approx(relative_step(long) / 2)
    sgd, momentum, adam = (
        learning_rate(ESConfig(population_size=32, generations=20, optimizer=name))
        for name in ("sgd", "momentum", "adam")
    )
    assert momentum == pytest.approx(0.1 * sgd, rel=0.1)
    assert adam == pytest.approx(0.01 * relative_step(ESConfig(generations=20)), rel=0.05)
    assert estimate_size(ESConfig(population_size=128)) == pytest.approx(0.289 / math.sqrt(128), rel=0.1)


FREE = {"generations", "population_size", "prompts_per_generation"}
WANTED = Amount(100, 32, 8)


def test_what_fits_into_a_time():
    def cost(amount, cell=0.1):
        return 1.15 * amount.generations * amount.members * amount.prompts * cell

    fewer = fit(WANTED, FREE, seconds=300, cell_seconds=0.1, prompts=40)
    assert fewer == Amount(20, 32, 4)
    few = fit(WANTED, FREE, seconds=200, cell_seconds=0.1, prompts=40)
    assert few == Amount(21, 20, 4)
    fewest = fit(WANTED, FREE, seconds=50, cell_seconds=0.1, prompts=40)
    assert fewest == Amount(6, 16, 4)
    assert cost(few) <= 200
    some = fit(WANTED, FREE, seconds=900, cell_seconds=0.1, prompts=40)
    assert some == Amount(30, 32, 8)
    many = fit(WANTED, FREE, seconds=9000, cell_seconds=0.1, prompts=40)
    assert many.prompts == 8
    assert many.members > 60 < many.generations
    assert 8500 < cost(many) <= 9000
    assert fit(WANTED, FREE, seconds=0, cell_seconds=0.1, prompts=40).generations == 1


def test_what_was_given_stays():
    assert fit(WANTED, {"generations"}, seconds=300, cell_seconds=0.1, prompts=40) == Amount(10, 32, 8)
    assert fit(Amount(5, 32, 8), set(), seconds=300, cell_seconds=0.1, prompts=40) == Amount(5, 32, 8)
    more = fit(Amount(10, 32, 8), {"population_size"}, seconds=920, cell_seconds=0.1, prompts=40)
    assert more == Amount(10, 100, 8)


def test_stand_ins():
    options = TuneOptions(model="tiny", sigma=0.3, optimizer="adam")
    assert automatic(options) == {"lr", "lr_schedule", "generations", "population_size", "prompts_per_generation"}
    numbers = with_stand_ins(options)
    assert (numbers.sigma, numbers.lr, numbers.population_size, numbers.lr_schedule) == (0.3, 0.003, 32, "exponential")
    assert not automatic(numbers)


class Elsewhere:
    """A worker whose members are somewhere else, as those of a pool are."""

    setup = SimpleNamespace(specs=())

    def __init__(self):
        self.asked = []
        self.world = world()

    def evaluate(self, generation, sigma, members):
        self.asked.append((generation, len(members)))
        return self.world(sigma, members)


def chosen(**settings):
    said = []
    options = TuneOptions(model="tiny", **settings)
    return choose(options, Elsewhere(), prompts=40, heldout=0, notify=said.append), said


def test_what_is_chosen_for_workers_elsewhere():
    """Their population stays as it is: another one would need other workers."""
    choice, said = chosen(minutes=0.5)
    options = choice.options
    assert not automatic(options)
    assert (options.population_size, options.prompts_per_generation, options.sigma) == (32, 8, 0.01)
    assert options.generations > 1000
    assert options.lr == pytest.approx(
        0.01 * 1.5 / math.sqrt(options.generations / 3) / (0.289 / math.sqrt(32)), rel=0.1
    )
    assert [line.split()[0] for line in choice.lines] == ["sigma", str(options.generations), "lr"]
    assert said == ["choosing settings: evaluating a few members at several sizes of perturbation"]
    assert choice.record()["levels"][0]["members"] == MEMBERS


def test_a_decay_that_was_given_stays():
    choice, _ = chosen(lr_decay=0.9)
    assert (choice.options.lr_schedule, choice.options.lr_decay) == ("exponential", 0.9)
    choice, _ = chosen(lr_schedule="cosine")
    assert choice.options.lr_schedule == "cosine"
    choice, _ = chosen(lr=0.1)
    assert (choice.options.lr, choice.options.lr_schedule) == (0.1, "exponential")


def test_nothing_is_evaluated_where_sigma_is_given():
    options = TuneOptions(model="tiny", sigma=0.01)
    worker = Elsewhere()
    choice = choose(options, worker, prompts=40, heldout=0, notify=print)
    assert worker.asked == []
    assert choice.calibration is None
    assert choice.lines == (
        f"lr {choice.options.lr:g}, linear (first steps of up to 0.26 sigma per entry, over 100 generations)",
    )


def told(evaluate, **settings):
    """What a calibration says of its steps: what is done, what was found."""
    said = []
    found = calibrate(evaluate, MEMBERS, 0.005, progress=lambda *step: said.append(step), **settings)
    return found, said


def test_each_sigma_is_told_with_how_many_are_left():
    found, said = told(world())
    doing = [step[0] for step in said]
    assert doing[:4] == [
        "evaluating the model as it is", "evaluating text that is broken, sigma 0.08",
        "trying sigma 0.005, at most 5 more", "trying sigma 0.01, at most 2 more",
    ]  # fmt: skip
    assert doing[-1] == ""
    assert len(said) == len(found.levels) + 3
    assert said[1][1] == f"the model as it is: mean score {found.center:.3g} on {PROMPTS} prompts"
    assert said[2][1] == f"broken text (sigma 0.08): mean score {found.broken:.3g}"
    assert said[3][1] == f"sigma 0.005: mean score {found.levels[0].mean:.3g} of 16 members"


def test_on_the_way_down_the_last_one_is_called_so():
    _, said = told(world(breaks=1e-6))
    assert [step[0] for step in said[2:-1]] == [
        "trying sigma 0.005, at most 5 more", "trying sigma 0.0025, at most 4 more",
        "trying sigma 0.00125, at most 3 more", "trying sigma 0.000625, at most 2 more",
        "trying sigma 0.0003125, at most 1 more", "trying sigma 0.00015625, the last one",
    ]  # fmt: skip


def test_a_choice_that_the_time_cut_short_is_told():
    now, free = [0.0], world()

    def evaluate(sigma, members):
        now[0] += len(members)
        return free(sigma, members)

    found = calibrate(evaluate, MEMBERS, 0.005, seconds=6.0, clock=lambda: now[0])
    assert found.reason.endswith("no larger one was tried, as the 6 s for choosing were over")
    assert "no larger one" not in calibrate(world(), MEMBERS, 0.005).reason


def test_a_model_that_scores_nothing_is_told():
    def evaluate(sigma, members):
        scores = np.zeros((len(members), PROMPTS))
        if 0.001 < sigma < 0.05:
            scores[::3] = 0.2
        return Evaluation(scores)

    found = calibrate(evaluate, MEMBERS, 0.01)
    assert found.warning.startswith(f"the model itself scores 0 on all {PROMPTS} prompts, so that there is only what")
    assert "(mean score 0.075 at sigma 0.01)" in found.warning
