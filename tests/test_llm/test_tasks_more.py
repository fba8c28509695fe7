"""GSM8K, reasoning-gym and zeros: splits, answers, and scorers that run nothing that a model wrote."""

import hashlib
import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll._optional import install_line
from eggroll.errors import ConfigError, DataError, MissingExtraError, RewardError
from eggroll.llm.tasks import get_task, gsm8k, is_task, names, reasoning, reasoning_problems, screening
from eggroll.llm.tasks.splits import SHARES, SPLITS, fill, normal, split_of


def splits_of(task):
    return {split: getattr(task, split) for split in SPLITS}


def test_names():
    assert names() == ["calculator", "countdown", "gsm8k", "guess_number", "maze", "one_sentence", "zeros"]
    assert is_task("one-sentence")
    assert is_task("reasoning_gym:whatever")
    assert not is_task("score.py:reward")
    with pytest.raises(ConfigError) as info:
        get_task("count-down")
    assert str(info.value) == (
        "there is no task 'count-down'; did you mean countdown? The tasks are calculator, countdown, "
        "gsm8k, guess_number, maze, "
        "one_sentence, zeros, "
        "reasoning-gym:NAME"
    )


# --- splits -------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=12), max_size=60), st.integers(0, 9))
def test_equal_problems_fall_into_one_split_in_any_order_and_number(keys, size):
    sizes = dict.fromkeys(SPLITS, size)
    one = fill(((key, {"key": key}) for key in keys), sizes)
    two = fill(((key, {"key": key}) for key in reversed([*keys, *keys])), dict.fromkeys(SPLITS, 99))
    for split in SPLITS:
        assert len(one[split]) <= size
        assert all(split_of(row["key"]) == split for row in one[split])
        assert {row["key"] for row in one[split]} <= {row["key"] for row in two[split]}
        assert len({row["key"] for row in two[split]}) == len(two[split])


def test_shares():
    counts = {split: sum(split_of(str(i)) == split for i in range(4000)) for split in SPLITS}
    for split, share in SHARES.items():  # five standard deviations of a binomial
        assert abs(counts[split] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_what_makes_two_texts_the_same():
    assert normal(" How  many\nEGGS? ") == normal("how many eggs?")
    assert normal("ﬁve ½") == normal("five 1⁄2")


@pytest.mark.parametrize("name", ["countdown", "zeros", "reasoning-gym:chain-sum"])
def test_no_problem_is_in_two_splits(name):
    task = get_task(name)
    seen = [normal(row["prompt"]) for rows in splits_of(task).values() for row in rows]
    assert len(set(seen)) == len(seen)
    assert all(len(rows) >= 16 for rows in splits_of(task).values())
    if name == "countdown":  # the same numbers in another order are the same problem
        keys = [(*sorted(row["numbers"]), row["target"]) for rows in splits_of(task).values() for row in rows]
        assert len(set(keys)) == len(keys)


# --- zeros --------------------------------------------------------------------------------------------------------


def test_zeros():
    reward = get_task("zeros").reward
    assert reward(["p"] * 5, ["000", "0 0\n0", "a0", "", "nothing"]) == [1.0, 1.0, 0.5, 0.0, 0.0]


HOSTILE = [
    "__import__('os').system('touch pwned')",
    "[open('pwned', 'w') for _ in [1]]",
    "().__class__.__base__.__subclasses__()",
    "exit()",
    "9**9**9",
    "(9**64)**64**64",
    "((((9**60)**60)**60)**60)",
    "99999999!",
    "factorial(99999999)",
    "exp(exp(exp(exp(9))))",
    "x**(10**9)",
    "(x + y + z + C)**64",
    "((((9**16)**16)**16)**16)",
    "(sin(x) + cos(x) + tan(x) + exp(x) + log(x))**16",
    "atan(tan(x)) + asin(sin(x)) + acos(cos(x)) + acosh(cosh(x)) + asinh(sinh(x))",
    "tan(x)*tan(2*x)*tan(3*x)*tan(4*x)*tan(5*x)*tan(6*x)*tan(7*x)",
    "1e999999999",
    "(" * 1_000_000,
    "[" * 1900,
    "٣+٤",
    "1/0",
    "\x00",
]


# --- GSM8K --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        (r"It is \boxed{72}.", "72", True),
        (r"\boxed{71} no, \boxed{72}", "72", True),
        (r"\boxed{72} no, \boxed{71}", "72", False),
        (r"\boxed{\$1{,}000.00}", "1000", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{72\text{ clips}}", "72", True),
        (r"\boxed{72 clips}", "72", True),
        (r"\boxed{50\%}", "50", True),
        (r"\boxed{x = 72}", "72", True),
        (r"\boxed{\frac{144}{2}}", "72", True),
        (r"\boxed{36 \cdot 2}", "72", True),
        (r"\boxed{-5}", "-5", True),
        (r"\boxed{0.5}", "1/2", True),
        (r"\boxed{}", "72", False),
        (r"\boxed{seventy-two} 72", "72", False),
        (r"\boxed{72", "72", True),  # cut off: the last number
        ("So 48 + 24 = 72.\n#### 72\nDone in 3 steps", "72", True),
        ("She sold 48, then 24, which makes 72 clips.", "72", True),
        ("It costs $1,234.50, of course.", "1234.5", True),
        ("72 clips and 3 friends", "72", False),
        ("nothing", "72", False),
        (r"\boxed{٧٢}", "72", False),
        (r"\boxed{9^{9^{9^{9}}}}", "72", False),
        (r"\boxed{9**9**9}", "72", False),
        (r"\boxed{99999999!}", "72", False),
        (r"\boxed{\sum_{i=1}^{999999999} i}", "72", False),
        (r"\boxed{\binom{99999999}{4444444}}", "72", False),
        (r"\boxed{__import__('os').system('touch pwned')}", "72", False),
        (r"\boxed{1/0}", "72", False),
        (r"\boxed{" + "(" * 1_000_000 + "}", "72", False),
        (r"\boxed{" * 100_000, "72", False),
        ("7" * 1_000_000, "7", False),
        ("1e999999999", "1", False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_gsm8k_answers(text, gold, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    scores = gsm8k.reward(
        ["p", []], [text, [{"role": "assistant", "content": text}]], answer=[gold, f"So.\n#### {gold}"]
    )
    assert [score >= 1 for score in scores] == [right, right]
    assert list(tmp_path.iterdir()) == []


def test_hostile_gsm8k_answers_take_no_time():
    """A bound on work, where computing one of them would take for ever; no answer comes twice."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    texts = [f"\\boxed{{{text}}}" for text in HOSTILE] + [r"\boxed{" * 200_000, "$" * 1_000_000, "1," * 500_000]
    texts += [f"\\boxed{{{'{' * deep}{n}^9^9^9{'}' * deep}}}" for n in range(100) for deep in (0, 30)]
    texts += [f"\\boxed{{\\frac{{{'9' * 60}}}{{{n}}}}}" for n in range(1, 100)]
    start = time.process_time()
    assert max(gsm8k.reward(["p"] * len(texts), texts, answer=["72"] * len(texts))) <= 0.1
    assert time.process_time() - start < 30


NESTED = "(" * 30 + "1" + ")" * 30


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("(((72)))", "72", True),
        ("(((10+2)*3)+(4*9))", "72", True),
        ("((3+4)*2)+(5*(6-2))", "34", True),
        ("2(36)", "72", True),
        (r"\dfrac{\frac{1}{2}}{2}", "0.25", True),
        ("0.333333", "1/3", True),
        ("0.33", "1/3", False),
        ("007", "7", True),
        ("((((1))))", "72", False),
        ("9*" * 39 + "9", "72", False),
        (NESTED, "72", False),
        ("[" + NESTED, "72", False),
        ("1/0", "72", False),
    ],
)
def test_arithmetic_in_an_answer_is_computed_without_a_clock(answer, gold, right, monkeypatch):
    """math-verify has a time limit, so a busy machine would decide what is right."""
    monkeypatch.setattr(gsm8k, "require", lambda *_, **__: pytest.fail("math-verify was asked"))
    if answer == "1/0":
        monkeypatch.undo()
    assert gsm8k.is_correct.__wrapped__(answer, gold) is right


def test_gsm8k_format():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    texts = [r"\boxed{72}", r"\boxed{71}", "72", r"\boxed{72} \boxed{72}", r"\boxed{}"]
    assert gsm8k.reward(["p"] * 5, texts, answer=["72"] * 5) == pytest.approx([1.1, 0.1, 1.0, 1.0, 0.0])
    with pytest.raises(RewardError, match='the reward "gsm8k" needs a column "answer"'):
        gsm8k.reward(["p"], ["72"])


@settings(max_examples=30)
@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${}", "{} apples", "{}.0", "{}."]))
def test_every_number_is_read_back(number, form):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert gsm8k.is_correct(form.format(number), str(number))
    assert not gsm8k.is_correct(form.format(number + 1), str(number))


def test_gsm8k_with_the_real_rows(data_dir):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    if not (data_dir / "gsm8k" / "test.jsonl.gz").exists():
        pytest.skip(f"{data_dir} has no gsm8k/test.jsonl.gz")
    task = get_task("gsm8k")
    sizes = {split: len(rows) for split, rows in splits_of(task).items()}
    assert sizes == {"train": 6709, "validation": 64, "heldout": 64, "test": 1319}
    seen = [normal(row["prompt"]) for rows in splits_of(task).values() for row in rows]
    assert len(set(seen)) == len(seen)
    rows = [*task.test[:60], *task.train[:40]]
    golds = [row["answer"] for row in rows]
    assert task.reward(rows, [f"So \\boxed{{{gold}}}" for gold in golds], answer=golds) == pytest.approx(
        [1.1] * len(rows)
    )
    assert max(task.reward(rows, [f"\\boxed{{{gold}1}}" for gold in golds], answer=golds)) < 1


def test_gsm8k_without_data(monkeypatch, tmp_path):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    monkeypatch.setenv("EGGROLL_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError) as info:
        gsm8k.splits()
    assert str(info.value).startswith("the task gsm8k needs its data set: ")
    assert "Set EGGROLL_DATA_DIR to a folder that holds gsm8k/train.jsonl.gz" in str(info.value)


@pytest.mark.parametrize(("module", "task"), [("math_verify", "gsm8k"), ("reasoning_gym", "reasoning-gym:gcd")])
def test_a_missing_package_is_named_with_the_pip_line(module, task):
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from eggroll.llm.tasks import get_task\n"
        f"try:\n    get_task({task!r})\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert shown.startswith(f"{MissingExtraError.__name__} '{module}' is needed here")
    assert install_line("tasks") in shown


# --- reasoning-gym ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")


def test_every_task_of_the_package_has_a_name(gym):
    assert len(reasoning_problems.names()) >= 100
    assert "composite" not in reasoning_problems.names()
    with pytest.raises(ConfigError) as info:
        get_task("reasoning-gym:chainsum")
    assert str(info.value) == "reasoning-gym has no task 'chainsum'; did you mean chain_sum or decimal_chain_sum?"


@pytest.mark.parametrize("name", ["chain_sum", "n_queens", "spiral_matrix", "string_insertion", "countdown", "gcd"])
def test_right_answers_score_one(gym, name):
    reward = reasoning.ReasoningReward(name)
    for index in range(8):
        answer = reasoning_problems.entry_of(name, index)["answer"]
        text = f"<answer>0</answer> or rather\n<answer>\n{answer}\n</answer>"
        assert reward(["p", "p"], [text, str(answer)], index=[index, index]) == [1.0, 1.0]
    with pytest.raises(RewardError, match=f'the reward "reasoning-gym:{name}" needs a column "index"'):
        reward(["p"], ["1"])


EVALUATING = screening.LITERALS | screening.ARITHMETIC | screening.SYMBOLIC


@pytest.mark.parametrize("name", [*sorted(EVALUATING), "coin_flip"])
def test_hostile_answers_run_nothing_and_score_nothing(gym, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # made here and not in a child process, which would make hundreds
    monkeypatch.setattr(reasoning, "entry_of", lambda name, index: reasoning_problems.dataset_of(name)[index])
    reward, count = reasoning.ReasoningReward(name), len(HOSTILE)
    reward(["p"], ["<answer>0</answer>"], index=[1])  # imports what the scorer needs
    start = time.process_time()
    scores = reward(["p"] * count, [f"<answer>{text}</answer>" for text in HOSTILE], index=[1] * count)
    assert max(scores) <= 0.05
    assert time.process_time() - start < 30
    assert list(tmp_path.iterdir()) == []


def test_the_same_answer_is_scored_once(gym, monkeypatch):
    """A population often agrees, and a scorer may take its whole time limit for what it does not like."""
    data, seen = reasoning_problems.dataset_of("simple_integration"), []

    class Counting:
        def score_answer(self, answer, entry):
            seen.append((answer, entry["metadata"]["integrand"]))
            raise TimeoutError

    monkeypatch.setattr(reasoning, "dataset_of", lambda name: Counting())
    reasoning._scored.cache_clear()
    reward = reasoning.ReasoningReward("simple_integration")
    assert reward(["p"] * 200, ["<answer>x - 512</answer>"] * 200, index=[0, 1] * 100) == [0.0] * 200
    assert seen == [("x - 512", data[index]["metadata"]["integrand"]) for index in (0, 1)]
    reasoning._scored.cache_clear()
    assert 0 < reasoning._scored.cache_info().maxsize <= 10_000


@pytest.mark.parametrize("name", ["simple_integration", "polynomial_multiplication"])
def test_right_answers_pass_the_screen_in_other_words_too(gym, name):
    for index in range(40):
        answer = str(reasoning_problems.dataset_of(name)[index]["answer"])
        assert screening.is_harmless(name, f"0 + {answer}", answer)


def test_a_child_that_hangs_is_given_up(gym, monkeypatch):
    monkeypatch.setattr(reasoning_problems, "CHILD_SECONDS", 0.05)
    with pytest.raises(ConfigError) as info:
        reasoning_problems._made_in_child("ransom_note", 3, 7)
    assert str(info.value).startswith("reasoning-gym made no 7 problems of 'ransom_note' in 0.05 seconds")


def test_scorers_that_evaluate_are_all_screened(gym):
    """A new version of the package may have new ones: this finds them by reading their source."""
    from reasoning_gym.factory import DATASETS

    found = set()
    for name, (kind, _) in DATASETS.items():
        source = inspect.getsource(kind.score_answer)
        helpers = set(re.findall(r"\b(\w+)\(answer\)", source)) & set(vars(sys.modules[kind.__module__]))
        source += "".join(
            inspect.getsource(vars(sys.modules[kind.__module__])[h]) for h in helpers if h.startswith("_")
        )
        if re.search(r"\b(?:eval|exec|parse_expr|sympify|simplify)\(", source):
            found.add(name)
    # number_sorting evaluates its own answer only
    assert found - {"number_sorting"} == EVALUATING


@pytest.mark.parametrize(
    ("name", "answer", "allowed"),
    [
        ("simple_integration", "x**3/3 + 2*sin(x)*exp(-x) + C", True),
        ("simple_integration", "sqrt(x**2 + 1)**(-1/2)", True),
        ("simple_integration", "x.__class__", False),
        ("simple_integration", "Lambda(x, x)", False),
        ("simple_integration", "x**65", False),
        ("simple_integration", "-768*x**5/5 + 1920*x**4 - 9600*x**3 + 24000*x**2 - 30000*x + C", True),
        ("simple_integration", "-2*x**3*sin(x) - 6*x**2*cos(x) + 12*x*sin(x) + 12*cos(x) + C", True),
        ("simple_integration", "exp(x)*sin(3*x)/10 - 3*exp(x)*cos(3*x)/10 + C", True),
        ("simple_integration", "(3*x + 10)**5/15 + C", True),
        ("simple_integration", "(a + b + c + d + x)**16", False),
        ("simple_integration", "(2**(1/2) + 3**(1/2) + 5**(1/2))**30*x", False),
        ("polynomial_multiplication", "3*x**4*y - 7", True),
        ("puzzle24", "(4 + 8) * 2 * 1", True),
        ("puzzle24", "4 ** 2", False),
        ("spiral_matrix", "1 2 3\n4 5 6", True),
        ("spiral_matrix", "[1, 2, 3]", True),
        ("spiral_matrix", "[i for i in [1]]", False),
        ("chain_sum", "anything", True),
        ("chain_sum", "1e99999", False),
        ("complex_arithmetic", "nan", False),
        ("complex_arithmetic", "1 + 2i", True),
    ],
)
def test_screening(name, answer, allowed):
    assert screening.is_harmless(name, answer, "right") is allowed


def test_a_scorer_that_takes_all_answers_is_not_used(gym):
    index = next(i for i in range(50) if reasoning_problems.entry_of("game_of_life_halting", i)["answer"] == "True")
    reward = reasoning.ReasoningReward("game_of_life_halting")
    assert reward(["p"] * 3, ["True", "False", "x"], index=[index] * 3) == [1.0, 0.0, 0.0]


def test_time_limit():
    with pytest.raises(TimeoutError, match="over 1 seconds"), screening.time_limit(1):
        sum(i for i in range(10**12))


def test_problems_are_the_same_in_every_process(gym):
    """Every run of this test has another hash seed than the one that these were made under."""
    made = [*reasoning_problems._made_in_child("isomorphic_strings", 0, 20)]
    made += [reasoning_problems.dataset_of("chain_sum")[index] for index in range(20)]
    digest = hashlib.blake2b("".join(entry["question"] for entry in made).encode(), digest_size=8).hexdigest()
    assert digest == "18b8f49642c4525d"


@pytest.mark.slow
@pytest.mark.skipif("not config.getoption('markexpr')", reason="makes problems of all tasks: run with -m slow")
def test_every_task_makes_problems_and_scores_their_answers(gym, capfd):
    for name in reasoning_problems.names():
        entry = reasoning_problems.entry_of(name, 0)
        score = reasoning.ReasoningReward(name)(["p"], [f"<answer>{entry['answer']}</answer>"], index=[0])[0]
        assert score == 1.0 or entry["answer"] is None, name


def test_files_are_short():
    folder = Path(inspect.getfile(gsm8k)).parent
    assert max(len(path.read_text().splitlines()) for path in folder.glob("*.py")) < 250
