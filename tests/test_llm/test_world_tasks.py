"""The tasks that ship with a world: how they are played, and that every step on the way counts."""

import pytest

from eggroll.errors import DataError
from eggroll.llm.tasks import calculator, get_task, guess_number, maze
from eggroll.llm.worlds.world import Completion

NAMES = ("calculator", "guess_number", "maze")


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_problem(name):
    task = get_task(name)
    splits = {key: {str(row) for row in getattr(task, key)} for key in ("train", "validation", "heldout", "test")}
    assert [len(rows) for rows in splits.values()] == [1024, 64, 64, 256]
    assert sum(map(len, splits.values())) == len(set.union(*splits.values()))
    assert task.reward([], [], world_score=[0.5, 1.0]) == [0.5, 1.0]


def play(world, row, *said):
    """The last turn of a game."""
    world.reset(row)
    turns = [world.step(Completion(text)) for text in said]
    return turns[-1]


GAME = {"high": 100, "number": 77}


@pytest.mark.parametrize(
    ("guesses", "answer"),
    [
        (["50"], "Higher than 50."),
        (["My guess is 90!"], "Lower than 90."),
        (["1 or 2"], "Write one number from 1 to 100."),
        (["101"], "Write one number from 1 to 100."),
        (["no"], "Write one number from 1 to 100."),
        (["77"], "Right!"),
    ],
)
def test_a_guess_is_answered(guesses, answer):
    assert play(guess_number.GuessNumber(), GAME, *guesses).messages == answer


def test_better_guesses_score_more():
    games = [
        ["no"] * 5, ["1"] * 5, ["50"] * 5, ["50", "60"], ["50", "75"], ["50", "75", "88", "80", "78"],
        ["50", "75", "88", "80", "77"],
    ]  # fmt: skip
    scores = [play(guess_number.GuessNumber(), GAME, *game).score for game in games]
    assert scores == sorted(scores)
    assert scores[0] == 0.0
    assert scores[-1] == 1.0
    assert all(0.0 < score < 1.0 for score in scores[1:-1])
    assert not play(guess_number.GuessNumber(), GAME, *["3"] * 4).done
    assert play(guess_number.GuessNumber(), GAME, *["3"] * 5).done


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (["calc(12 * 34)", "It is 408."], 1.0),
        (["The product: calc(12*34)", "12 * 34 is 408"], 1.0),
        (["calc: 12 * 34", "408"], 1.0),
        (["calc(12 + 34)", "408"], 0.7),
        (["calc(12 + 34)", "46"], 0.3),
        (["calc(12 * 34)", "I do not know"], 0.6),
        (["calc(a dozen)", "46"], 0.15),
        (["calc(9**9)", "46"], 0.15),
        (["408"], 1.0),
        (["46"], 0.0),
        (["calc(12 * 34)"] * 3, 0.6),
    ],
)
def test_the_calculator_is_worth_calling(said, score):
    turn = play(calculator.Calculator(), {"prompt": "What is 12 * 34?", "answer": 408}, *said)
    assert turn.done
    assert turn.score == pytest.approx(score)


def test_the_calculator_takes_calls_of_functions():
    world = calculator.Calculator()
    world.reset({"prompt": "What is 12 * 34?", "answer": 408})
    turn = world.step(Completion("", [{"name": "calculate", "arguments": {"expression": "12 * 34"}}]))
    assert turn.messages == "The calculator says 408."


def test_every_maze_can_be_left():
    for row in get_task("maze").test[:32]:
        world = maze.Maze()
        world.reset(row)
        assert 0 < world.start <= maze.REACH < maze.MAX_TURNS
        scores = []
        while True:
            way = min(world._open(), key=lambda way: world.ways[maze._beside(world.room, way)])
            turn = world.step(Completion(way))
            scores.append(turn.score)
            if turn.done:
                break
        assert scores[-1] == 1.0
        assert scores == sorted(scores)


def test_walls_and_other_words():
    row = get_task("maze").test[0]
    world = maze.Maze()
    assert world.reset(row).startswith("The exit is ")
    assert world.step(Completion("North!")).messages.startswith("There is a wall. The exit is ")
    assert world.step(Completion("east or south")).messages.startswith("Say one direction. The exit is ")
    assert world.step(Completion("hm")).score == pytest.approx(0.1 / 3)
    assert len(maze.doors_of(7, 3)) == 49


@pytest.mark.parametrize(
    ("module", "row", "message"),
    [
        (guess_number, {"high": 5, "number": 6}, "guess_number needs whole numbers high"),
        (guess_number, {}, "got high=None and number=None"),
        (calculator, {"answer": "7"}, "calculator needs a whole number answer, got '7'"),
        (maze, {"size": 99, "seed": 1}, "maze needs whole numbers size .2 to 32. and seed, got size=99"),
    ],
)
def test_other_rows_are_refused(module, row, message):
    with pytest.raises(DataError, match=message):
        module.check(row)
