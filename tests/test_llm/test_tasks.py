"""The tasks that ship with eggroll: their data, what good answers score, and that nonsense does not."""

import re
import subprocess
import sys
from collections import Counter
from statistics import mean

import pytest

from eggroll.errors import ConfigError, RewardError
from eggroll.llm.tasks import get_task, names
from eggroll.llm.tasks.one_sentence import MAX_WORDS, parts, score

TASK = get_task("one_sentence")
SPLITS = {"train": TASK.train, "validation": TASK.validation, "heldout": TASK.heldout}
EVERY = [row for rows in SPLITS.values() for row in rows]
VIOLIN = ("What is a violin?", ["instrument"])


def mean_score(answer, rows=EVERY):
    """The mean score of ``answer(row)`` over rows."""
    return mean(score(row["prompt"], answer(row), row["answer"], row["wrong"]) for row in rows)


def commonest_terms(rows):
    """Accepted terms, each the one that answers most of the questions that those before it do not."""
    terms, left = [], list(rows)
    while left:
        term = Counter(term for row in left for term in row["answer"]).most_common(1)[0][0]
        terms.append(term)
        left = [row for row in left if term not in row["answer"]]
    return terms


def test_registry():
    assert "one_sentence" in names()
    assert get_task("one-sentence").name == "one_sentence"
    message = (
        "there is no task 'one_sentense'; did you mean one_sentence? The tasks are aime24, aime25, amc, calculator"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_task("one_sentense")


def test_a_task_shows_its_sizes_and_not_its_rows():
    task = get_task("one_sentence")
    sizes = f"train={len(task.train)}, validation={len(task.validation)}, heldout={len(task.heldout)}, test=0"
    assert repr(task) == f"Task('one_sentence', {task.description!r}, rows: {sizes})"


def test_tasks_need_neither_torch_nor_transformers():
    code = (
        "import sys; from eggroll.llm.tasks import get_task; get_task('one_sentence'); "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_splits_are_large_enough_and_share_no_question_and_no_subject():
    assert len(TASK.train) >= 160
    assert len(TASK.validation) >= 48
    assert len(TASK.heldout) >= 48
    assert len({row["prompt"].lower() for row in EVERY}) == len(EVERY)
    frame = """what is a an the where who was does do used for made from eat measure baby called opposite of language
        spoken in"""
    common = {word.rstrip("s") for word in frame.split()}
    words = {
        name: {word.rstrip("s") for row in rows for word in re.findall(r"[\w']+", row["prompt"].lower())} - common
        for name, rows in SPLITS.items()
    }
    assert not words["train"] & words["heldout"]
    assert not words["validation"] & words["heldout"]
    assert not words["train"] & words["validation"]


def test_every_question_can_be_answered_perfectly_and_does_not_hold_its_answer():
    for row in EVERY:
        assert set(row) == {"prompt", "answer", "wrong", "category"}
        assert not {*row["answer"]} & {*row["wrong"]}
        assert re.fullmatch(r"[A-Z].*\?", row["prompt"])
        assert all(term and term == term.lower() for term in row["answer"])
        assert score(row["prompt"], f"The answer is {row['answer'][0]}.", row["answer"]) == 1, row
        assert parts(row["prompt"], row["prompt"], row["answer"])["correct"] == 0, row


@pytest.mark.parametrize(
    ("prompt", "accepted", "answer"),
    [
        (*VIOLIN, "A violin is a musical instrument."),
        (*VIOLIN, "It's an instrument."),
        (*VIOLIN, "Violins are string instruments played with a bow!"),
        ("What do koalas eat?", ["eucalyptus"], "Koalas eat eucalyptus leaves."),
        ("What does a baker do?", ["bread"], "A baker bakes bread, cakes and other baked goods."),
        ("What is the opposite of hot?", ["cold"], "Cold is the opposite of hot."),
        ("Where is Peru?", ["south america"], "Peru is in South America."),
        ("What is bread made from?", ["flour"], "Bread is made from flour, water, yeast, and salt."),
        (
            "Who was Martin Luther King Jr.?",
            ["minister"],
            "Martin Luther King Jr. was an American minister and leader.",
        ),
        ("Where is the White House?", ["washington"], "The White House is in Washington, D.C."),
        ("Who was J. S. Bach?", ["composer"], "J. S. Bach was a German composer."),
        ("What does a scale measure?", ["weight"], "A scale measures weights up to 2.5 kg."),
    ],
)
def test_answers_that_a_person_wants_score_one(prompt, accepted, answer):
    assert score(prompt, answer, accepted) == 1


NONSENSE = {
    "nothing": lambda row: "",
    "blanks": lambda row: " \n ",
    "full stops": lambda row: ". . . .",
    "echo": lambda row: row["prompt"],
    "echo with a full stop": lambda row: row["prompt"].rstrip("?") + ".",
    "always Paris": lambda row: "Paris.",
    "a true sentence on something else": lambda row: "The capital of France is Paris.",
    "a vague sentence": lambda row: "It is a kind of thing that many people know.",
    "a negated answer": lambda row: f"It is not {row['answer'][0]}.",
    "the answer alone": lambda row: row["answer"][0].capitalize() + ".",
    "the answer again and again": lambda row: (row["answer"][0] + " ") * 10 + ".",
    "one sentence again and again": lambda row: f"The answer is {row['answer'][0]}. " * 3,
    "question, then answer": lambda row: f"{row['prompt']} {row['answer'][0].capitalize()}.",
    "question as a statement with the answer": lambda row: f"{row['prompt'].rstrip('?')} {row['answer'][0]}.",
    "no capital letter, no full stop": lambda row: f"the answer is {row['answer'][0]}",
    "signs": lambda row: f"## The *answer* is | {row['answer'][0]} |",
    "all terms, with commas": lambda row: ", ".join(commonest_terms(TASK.heldout)) + ".",
    "all terms, without commas": lambda row: " ".join(commonest_terms(TASK.heldout)) + ".",
    "right, but buried": lambda row: "I am glad that you ask me this. " * 3 + f"The answer is {row['answer'][0]}.",
}


@pytest.mark.parametrize("attack", NONSENSE)
def test_nonsense_scores_far_below_a_good_answer(attack):
    assert mean_score(NONSENSE[attack], TASK.heldout) <= 0.3


@pytest.mark.parametrize("separator", [", ", " and ", " or ", " of the ", " ", "/"])
def test_no_constant_list_of_answers_scores_well_even_with_the_held_out_answers_known(separator):
    terms = commonest_terms(TASK.heldout)
    best = max(
        mean_score(lambda row, few=few: f"It is {separator.join(terms[:few])}.", TASK.heldout) for few in range(1, 11)
    )
    assert 0 < best < 0.25


def test_every_step_from_rambling_to_a_good_answer_scores_more():
    steps = [
        "A violin is a thing that many people love. It is an instrument with a long story. It is",
        "A violin is an instrument with a very long story in the whole of Europe. It is loved and it",
        "A violin is an instrument with a very long story in the whole of Europe. It is loved.",
        "A violin is an instrument with a very long story in the whole of Europe.",
        "A violin is an instrument with a long story in all Europe.",
    ]
    scores = [score(VIOLIN[0], step, VIOLIN[1]) for step in steps]
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)
    assert scores[-1] == 1


@pytest.mark.parametrize("count", [2, 3, MAX_WORDS, MAX_WORDS + 1, 30])
def test_length(count):
    words = ["Violins", "are", *["instruments"] * (count - 2)]
    length = parts(VIOLIN[0], " ".join(words) + ".", VIOLIN[1])["length"]
    assert length == pytest.approx({2: (2 / 3) ** 3, 13: 12 / 13, 30: 12 / 30}.get(count, 1))


def test_the_best_possible_score_is_one():
    answers = ["A violin is an instrument.", "Instrument.", "It is an instrument. " * 4, "instrument " * 30]
    assert max(score(VIOLIN[0], answer, VIOLIN[1]) for answer in answers) == 1


def test_reward_follows_the_convention_of_trl():
    prompts, answers = ["What is a violin?", "Where is Cairo?"], [["instrument"], ["egypt"]]
    completions = ["A violin is an instrument.", "Cairo is in Asia."]
    assert TASK.reward(prompts=prompts, completions=completions, answer=answers, category=["x", "y"]) == [1.0, 0.0]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    replies = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert TASK.reward(conversations, replies, answer=answers) == [1.0, 0.0]
    completions = ["A violin is an instrument.", "Cairo is in Egypt, Spain."]
    assert TASK.reward(prompts, completions, answer=answers, wrong=[[], ["spain"]]) == [1.0, 0.5]
    logged = {}
    TASK.reward(prompts, completions, answer=answers, wrong=[[], ["spain"]], log_extra=logged.__setitem__)
    assert list(logged) == ["correct", "length", "single", "ending", "sound"]
    assert logged["correct"] == [1.0, 0.5]
    with pytest.raises(RewardError, match='the reward "one_sentence" needs a column "answer"'):
        TASK.reward(prompts, completions)
