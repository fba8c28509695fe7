"""The script of the open questions: runs are kept, each variant gets the best rate, the table says what was found."""

from __future__ import annotations

import pytest
import torch

from eggroll.recipes.images import Images


@pytest.fixture
def science(load):
    return load("science/questions")


@pytest.fixture
def data():
    """Images that a network can tell apart: each digit has a bright row of its own."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (600,), generator=draw)
    images = 0.3 * torch.randn(600, 28, 28, generator=draw)
    images[torch.arange(600), 2 * labels] += 2.0
    parts = ((images[i : i + 200], labels[i : i + 200]) for i in (0, 200, 400))
    return Images("made", "here", *parts)


def test_a_run_learns_and_is_kept(science, data, tmp_path, monkeypatch):
    book = science.Book(tmp_path / "runs.jsonl", data)
    settings = {**science.BASE, "population_size": 32, "budget": 32 * 40}
    untrained = book.run({**settings, "budget": 32}, 0.02, 1e-9, 0)
    trained = book.run(settings, 0.02, 0.03, 0)
    assert trained["bits"] < untrained["bits"] - 0.5
    assert trained["right"] > untrained["right"]
    monkeypatch.setattr(science, "evolve", lambda *given: pytest.fail("was run again"))
    assert science.Book(tmp_path / "runs.jsonl", data).run(settings, 0.02, 0.03, 0) == trained


def test_rates_are_chosen_on_other_images_than_the_measured_ones(science, data, tmp_path):
    book = science.Book(tmp_path / "runs.jsonl", data)
    settings = {**science.BASE, "population_size": 8, "budget": 16}
    blind = science.Images("made", "here", data.train, data.validation, (data.test[0], 9 - data.test[1]))
    other = science.Book(tmp_path / "other.jsonl", blind)
    tuning = [each.run(settings, 0.02, 0.01, science.TUNING) for each in (book, other)]
    measured = [each.run(settings, 0.02, 0.01, 0) for each in (book, other)]
    assert tuning[0] == tuning[1]
    assert measured[0] != measured[1]


def test_gradients_for_comparison(science, data, tmp_path):
    book = science.Book(tmp_path / "runs.jsonl", data)
    assert book.run({"steps": 60}, 0.02, 0.03, 0)["bits"] < book.run({"steps": 1}, 0.02, 1e-9, 0)["bits"] - 1.0


@pytest.mark.parametrize(("best", "tried"), [(0.01, 3), (0.1, 4), (0.0003, 5)])
def test_the_grid_grows_while_the_best_is_at_its_end(science, best, tried, monkeypatch, tmp_path):
    book = science.Book(tmp_path / "runs.jsonl", None)
    seen = []

    def run(settings, sigma, lr, seed):
        seen.append((lr, seed))
        return {"bits": abs(science.RATES.index(lr) - science.RATES.index(best))}

    monkeypatch.setattr(book, "run", run)
    assert book.rate({}, 0.1) == best
    assert {seed for _, seed in seen} == {science.TUNING}
    assert len(seen) == tried


def test_table_and_picture(science, tmp_path):
    rows = [{"variant": "rank 1", "lr": 0.01, "bits": [2.0, 2.5, 3.0], "right": [0.5, 0.6, 0.7]}]
    assert "| rank 1 | 2.500 (2.000 to 3.000) | 60.0 (50.0 to 70.0) | 0.01 |" in science.table({"Does it?": rows})
    science.draw({"Does it?": [*rows, *rows], "Alone?": rows}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_variant_is_a_setting_that_can_run(science):
    for question, variants in science.QUESTIONS.items():
        for settings in ({**science.BASE, **changes} for changes in variants.values()):
            assert settings["parts"] in science.PARTS, question
            assert settings["budget"] % settings["population_size"] == 0
