"""The script of the open questions: runs are kept, each variant gets the best rate, the table says what was found."""

from __future__ import annotations

import itertools

import pytest


@pytest.fixture
def science(load):
    return load("science/questions")


@pytest.fixture
def text(science, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return science.Text(path)


def test_parts_of_the_text_do_not_overlap(science, text):
    ranges = [text.ranges[part] for part in ("train", "choose", "measure")]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
    ids, following = text.batch("measure", 50, seed=1)
    assert ids.shape == (50, science.CONTEXT)
    assert following.shape == (50,)


def test_a_run_learns_and_is_kept(science, text, tmp_path, monkeypatch):
    monkeypatch.setattr(science, "MEASURED", 500)
    book = science.Book(tmp_path / "runs.jsonl", text)
    settings = {**science.BASE, "population_size": 32, "budget": 32 * 40}
    untrained = book.bits({**settings, "budget": 32}, 0.02, 1e-9, 0)
    trained = book.bits(settings, 0.02, 0.03, 0)
    assert trained < untrained - 1.0
    monkeypatch.setattr(science, "evolve", lambda *given: pytest.fail("was run again"))
    assert science.Book(tmp_path / "runs.jsonl", text).bits(settings, 0.02, 0.03, 0) == trained


def test_gradients_for_comparison(science, text, tmp_path, monkeypatch):
    monkeypatch.setattr(science, "MEASURED", 500)
    book = science.Book(tmp_path / "runs.jsonl", text)
    assert book.bits({"steps": 60}, 0.02, 0.03, 0) < book.bits({"steps": 1}, 0.02, 1e-9, 0) - 1.0


@pytest.mark.parametrize(("best", "tried"), [(0.01, 3), (0.1, 4), (0.001, 4)])
def test_the_grid_grows_while_the_best_is_at_its_end(science, best, tried, monkeypatch, tmp_path):
    book = science.Book(tmp_path / "runs.jsonl", None)
    seen = []
    monkeypatch.setattr(
        book,
        "bits",
        lambda settings, sigma, lr, seed: (
            seen.append((lr, seed)) or abs(science.RATES.index(lr) - science.RATES.index(best))
        ),
    )
    assert book.rate({}, 0.1) == best
    assert {seed for _, seed in seen} == {science.TUNING}
    assert len(seen) == tried


def test_table(science):
    rows = [{"variant": "rank 1", "lr": 0.01, "bits": [2.0, 2.5, 3.0], "mean": 2.5}]
    assert "| rank 1 | 2.500 (2.000 to 3.000) | 0.01 |" in science.table({"Does it?": rows})


def test_every_variant_is_a_setting_that_can_run(science):
    for question, variants in science.QUESTIONS.items():
        for settings in ({**science.BASE, **changes} for changes in variants.values()):
            assert settings["parts"] in science.PARTS, question
            assert settings["budget"] % settings["population_size"] == 0
