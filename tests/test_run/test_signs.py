"""What is said of a run's numbers: scores of known components, and held-out scores, learning and cosines by hand."""

import numpy as np
import pytest

from eggroll.core.config import ESConfig
from eggroll.loop import Evaluation, Heldout, Loop
from eggroll.run.keeping import Standing
from eggroll.run.signs import Signs

CONFIG = ESConfig(population_size=32, lr=0.05)


def scores(spread, noise, generation, prompts=8, pairs=16):
    rng = np.random.default_rng(generation)
    odd = spread * rng.normal(size=(pairs, 1, 1)) * np.array([1.0, -1.0]).reshape(1, 2, 1)
    return (odd + noise * rng.normal(size=(pairs, 2, prompts))).reshape(2 * pairs, prompts)


def said(tables, *, start=0, heldout=(), cosines=(), means=None):
    """``(generation, text)`` of everything that is said about a run."""
    signs, history, standing, found = Signs(CONFIG, start), [], Standing(), []
    heldout = dict(heldout)
    if 0 in heldout:
        standing.add(0, heldout[0])
    for generation, table in enumerate(tables, start=start + 1):
        line = {"generation": generation, **signs.measure(table), "fitness_std": float(table.mean(axis=-1).std())}
        line["fitness_mean"] = float(table.mean()) if means is None else means[generation - 1]
        if generation <= len(cosines):
            line["update_cosine"] = cosines[generation - 1]
        if generation in heldout:
            standing.add(generation, heldout[generation])
        history.append(line)
        found += [(generation, text) for text in signs.texts(history, standing)]
    return found


def run_of(spread, noise, generations=50, **how):
    return [scores(spread, noise, generation, **how) for generation in range(generations)]


@pytest.mark.parametrize("spread", [1.0, 0.5])
def test_a_healthy_run_says_one_short_line(spread):
    heldout = {generation: 0.2 + 0.01 * generation for generation in range(0, 51, 10)}
    cosines = np.random.default_rng(0).normal(0.02, 0.05, size=50)
    ((when, text),) = said(run_of(spread, 1.0), heldout=heldout, cosines=cosines)
    assert when == 3
    assert text.startswith("there is signal: members' scores agree between halves of the prompts (reliability 0.")
    assert len(text) < 100


def test_only_noise():
    ((when, text),) = said(run_of(0.0, 0.5))
    assert when == 3
    assert text.startswith(
        "no signal to be seen in 3 generations: members' scores differ no more than the noise between"
    )
    assert " 8 prompts explains (a single score varies by 0." in text
    assert text.endswith("use more prompts per generation, a larger sigma or a larger population")


def test_noise_that_is_much_larger_than_the_spread():
    """True ratio of a row: noise 1 to spread sqrt(2) * 0.13, about 5.4."""
    ((when, text),) = said(run_of(0.13, 1.0, generations=6, pairs=200))
    assert when == 3
    assert text.startswith("weak signal in 3 generations: the noise between prompts is 5")
    assert "Use more prompts per generation than 8 (about 32), a larger sigma" in text


def test_a_signal_that_is_lost_and_found_is_said_once_each():
    tables = run_of(1.0, 1.0, 3) + run_of(0.0, 1.0, 60) + run_of(1.0, 1.0, 60)
    texts = said(tables)
    assert [text.split(":")[0] for _, text in texts] == ["there is signal", "no signal to be seen in 10 generations"]
    assert texts[1][0] == 23  # two windows of ten after the first three
    late = said(run_of(0.0, 1.0, 3) + run_of(1.0, 1.0, 40))
    assert [text.split(":")[0] for _, text in late] == ["no signal to be seen in 3 generations", "there is signal"]
    assert late[1][0] == 13


def test_a_resumed_run_does_not_say_it_again():
    assert said(run_of(1.0, 1.0, 30), start=20) == []


@pytest.mark.parametrize("tables", [[np.arange(32.0)] * 30, [np.zeros((32, 8))] * 30, run_of(1.0, 1.0, 30, prompts=1)])
def test_nothing_is_said_where_nothing_can_be_known(tables):
    assert said(tables) == []


def test_few_members_are_looked_at_when_there_are_enough_of_them():
    ((when, _),) = said(run_of(3.0, 1.0, 9, pairs=2))
    assert when == 4  # 8 pairs


def test_a_held_out_score_that_fell():
    """The members' mean scores differ by about sqrt(1 + 1/8)."""
    heldout = {0: 1.0, 10: 3.0, 20: 2.5, 30: -2.0, 40: -3.0}
    texts = said(run_of(1.0, 1.0), heldout=heldout)
    assert [when for when, _ in texts] == [3, 30]
    assert texts[1][1].startswith("held-out fell to -2.000 after generation 30, from 3.000 after generation 10: ")
    assert texts[1][1].endswith(
        "times the spread between members, so sigma or lr is too large. Try a smaller lr, such as 0.015"
    )
    first = said(run_of(1.0, 1.0, 10), heldout={0: 5.0, 10: 0.0})
    assert ", from 5.000 before training: " in first[1][1]


def test_held_out_falls_while_training_rises():
    heldout = {0: 0.50, 10: 0.49, 20: 0.48, 30: 0.47}
    rising = list(np.linspace(0, 1, 30))
    (_, (when, text)) = said(run_of(1.0, 1.0, 30), heldout=heldout, means=rising)
    assert when == 30
    assert text.startswith("held-out falls while training rises: 0.5000 to 0.4700 from generation 0 to 30, and 0.2")
    assert "The model learns these prompts more than the task" in text
    for means, scores in ((rising[::-1], heldout), (rising, {**heldout, 20: 0.495}), ([0.5] * 30, heldout)):
        assert len(said(run_of(1.0, 1.0, 30), heldout=scores, means=means)) == 1


def test_updates_that_turn_back():
    cosines = np.random.default_rng(0).normal(-0.5, 0.1, size=30)
    (_, (when, text)) = said(run_of(1.0, 1.0, 30), cosines=cosines)
    assert when == 10
    assert text.startswith("each update takes back a part of the one before (cosine -0.49, mean of 10 gen")
    assert text.endswith("lr is too large. Try a smaller one, such as 0.015")
    wide = np.random.default_rng(0).normal(-0.3, 0.6, size=10)  # a net of a few parameters
    assert len(said(run_of(1.0, 1.0, 10), cosines=wide)) == 1


class Worker:
    update_cosine = 0.1

    def evaluate(self, generation, sigma, members):
        return Evaluation(scores(1.0, 1.0, generation))

    def heldout(self, generation):
        return Heldout(float(generation))

    def apply(self, record):
        return 1.0

    def state_tensors(self):
        return {}

    def load_state_tensors(self, tensors):
        pass


class Listener:
    def __init__(self):
        self.told = []

    def generation(self, metrics):
        pass

    def message(self, text):
        self.told.append(text)


def test_the_loop_logs_and_tells(recwarn):
    listener = Listener()
    config = ESConfig(population_size=32, generations=12)
    history = Loop(config, Worker(), heldout=True, eval_every=4, listeners=[listener]).go()
    assert len(listener.told) == 1
    assert listener.told[0].startswith("there is signal")
    for line in history:
        assert 0 < line["split_half"] < 1
        assert line["member_spread"] == pytest.approx(1.4, abs=0.7)
        assert line["prompt_noise"] == pytest.approx(1.0, abs=0.25)
    Loop(config, Worker()).go()  # nobody listens: no warnings for what is no fault
    assert not recwarn.list
