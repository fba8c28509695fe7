"""The task ``one_sentence``: answer a question correctly, in one sentence of at most twelve words.

Told to answer in one short sentence, a small chat model begins "What is a hammer?" well, and then rambles and makes
things up until it is cut. What a person wants is the beginning: "A hammer is a tool used for driving nails." The reward
counts words and full stops in generated text, so no gradient passes through it.

    reward = correct * form * sound                     each in [0, 1]; a perfect answer scores exactly 1

    correct  1 if an accepted term stands in the first sentence, 1/2 if it comes later, 0 if it is missing or negated;
             half of that if a wrong term is there too ("Lisbon is a city in Portugal, Spain.")
    form     (length * single * ending)^(1/3)           graded, so that every improvement shows
               length   1 for 3 to 12 words, 12/n for n more than that, (n/3)^3 for n fewer
               single   1/(number of sentences); one that was cut off counts too
               ending   1 if it ends in a full stop or exclamation mark, 1/8 if not
    sound    the product of the guards against nonsense, each 1 for ordinary prose: starts with a capital letter, has a
             verb, does not repeat itself, does not repeat the question, does not list many answers, is plain text

Nothing scores without a right answer: an accepted term never stands in its question (a test), so that echoing the
question scores 0, and the questions ask for hundreds of different things, so that no constant answer scores well.

The questions were written for this task. Of about a thousand, those stayed whose answer SmolLM2-135M-Instruct, as it
is, names in the first sentence of its long greedy answer: what is learned is the form, and to stay correct in it. The
splits were then drawn at random within categories; no subject (a violin, Kenya) stands in two splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.tasks.answers import text_of

__all__ = ["DESCRIPTION", "MAX_TOKENS", "MAX_WORDS", "MIN_WORDS", "SETTINGS", "SYSTEM", "parts", "reward", "score"]

DESCRIPTION = "Answer the question correctly, in one sentence of at most twelve words."
MAX_TOKENS = 32
MIN_WORDS = 3
MAX_WORDS = 12
SYSTEM: str | None = "Answer in one short sentence."
SETTINGS: dict[str, Any] = {
    "population_size": 32,
    "rank": 1,
    "sigma": 0.01,
    "lr": 0.05,
    "lr_schedule": "linear",
    "optimizer": "sgd",
    "vectors": True,
    "prompts_per_generation": 8,
    "generations": 30,
    "eval_every": 5,
}

_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")
_STOP = re.compile(r"[.!?]+[\"')\]”’]*(?=\s|$)|\n+")
_ABBREVIATION = re.compile(
    r"(?:\b(?:jr|sr|dr|mr|mrs|ms|st|mt|vs|no|etc|e\.g|i\.e)|\b(?:[a-z]\.)*[a-z])$", re.IGNORECASE
)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NEGATION = _set("not no never neither nor isn't aren't wasn't weren't doesn't don't cannot can't")
_QUESTION = _set("what who whom where why how which when whose")
_FUNCTION = _set(
    """a an the this that these those it its he she they them his her their i we you your our my and or but nor so if
    as of in on at to by for from with without into onto over under between than then about around through during
    within is are was were be been being am has have had do does did can could will would may might must should shall
    not no also very more most much many some any all each every other one who which what where when whose how why
    such often usually typically mainly mostly used made called known"""
)
_VERBS = _set(
    """is are was were be has have had do did can could will would may might must should means make made eat drink
    live lie need use say speak wrote write play give take grow work help come go keep see hear feel build fly run hunt
    feed graze prefer consume include fix repair cook teach sell serve care design refer contain it's that's they're
    he's she's"""
)
_ODD = re.compile(r"[^\w\s.,;:!?'\"’‘“”()°%&$£€/–—-]")


def _sentences(text: str) -> list[str]:
    """The sentences of ``text``; a last one that was cut off is one of them."""
    sentences, start = [], 0
    for stop in _STOP.finditer(text):
        at_end = not text[stop.end() :].strip()
        if not at_end and stop.group().startswith(".") and _ABBREVIATION.search(text[start : stop.start()]):
            continue
        sentences.append(text[start : stop.end()].strip())
        start = stop.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if _WORD.search(sentence)]


def _words(text: str) -> list[str]:
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def _names(sentence: str, accepted: Sequence[str]) -> bool:
    """Whether the sentence has one of the accepted terms as a whole word (or its plural), not negated."""
    words = _words(sentence)
    for term in accepted:
        wanted = _words(term)
        for start in range(len(words) - len(wanted) + 1):
            found = words[start : start + len(wanted)]
            same_stem = found[:-1] == wanted[:-1] and found[-1] in {wanted[-1] + end for end in ("", "s", "es", "'s")}
            if same_stem and not _NEGATION.intersection(words[max(0, start - 4) : start]):
                return True
    return False


def _correct(sentences: Sequence[str], accepted: Sequence[str], wrong: Sequence[str]) -> float:
    right = [_names(sentence, accepted) for sentence in sentences]
    if not any(right):
        return 0.0
    contradicted = any(_names(sentence, wrong) for sentence in sentences)
    return (1.0 if right[0] else 0.5) * (0.5 if contradicted else 1.0)


def _form(text: str, sentences: Sequence[str], words: Sequence[str]) -> dict[str, float]:
    count = len(words)
    length = min(1.0, MAX_WORDS / count) if count >= MIN_WORDS else (count / MIN_WORDS) ** 3
    ended = text.rstrip("\"')]”’").endswith((".", "!"))
    return {"length": length, "single": 1 / len(sentences), "ending": 1.0 if ended else 0.125}


def _sound(prompt: str, text: str, sentences: Sequence[str], words: Sequence[str]) -> float:
    content = [word for word in words if word not in _FUNCTION]
    fresh = len(set(content)) / max(1, len(content))
    asked = _words(prompt)
    echoed = words[0] in _QUESTION or any(
        words[start : start + len(asked)] == asked for start in range(len(words) - len(asked) + 1)
    )
    verb = any(word in _VERBS for word in words) or any(len(w) > 3 and w.endswith(("s", "ed")) for w in words[1:])
    listed = max(_listed(sentence) for sentence in sentences)
    odd = _ODD.search(text) or any(len(word) > 24 for word in words)
    return (
        (1.0 if text[0].isupper() or text[0].isdigit() or text[0] in '"“' else 0.5)
        * (1.0 if verb else 0.25)
        * min(1.0, fresh / 0.75) ** 2
        * (0.25 if echoed else 1.0)
        * min(1.0, 4 / max(1, listed)) ** 2
        * (0.5 if odd else 1.0)
    )


def _listed(sentence: str) -> int:
    """How many answers a sentence seems to list: what separates them, or the longest run of words not joined."""
    words = _words(sentence)
    separators = len(re.findall(r"[,;/&:–—]", sentence)) + words.count("and") + 2 * words.count("or")
    longest = run = 0
    for word in words:
        run = 0 if word in _FUNCTION or word in _VERBS else run + 1
        longest = max(longest, run)
    return max(separators, longest - 1)


def parts(prompt: str, completion: str, accepted: Sequence[str], wrong: Sequence[str] = ()) -> dict[str, float]:
    """What an answer's score is made of: ``correct, length, single, ending, sound``, each in [0, 1].

    Args:
        prompt: the question.
        completion: the answer, as it was generated.
        accepted: the terms of which a right answer names one, lower case.
        wrong: terms that no right answer names, lower case.
    """
    text = completion.strip()
    sentences, words = _sentences(text), _words(text)
    if not words:
        return {"correct": 0.0, "length": 0.0, "single": 0.0, "ending": 0.0, "sound": 0.0}
    form = _form(text, sentences, words)
    correct = _correct(sentences, accepted, wrong)
    return {"correct": correct, **form, "sound": _sound(prompt, text, sentences, words)}


def score(prompt: str, completion: str, accepted: Sequence[str], wrong: Sequence[str] = ()) -> float:
    """The reward of one answer, in [0, 1]; the arguments are those of :func:`parts`."""
    return _total(parts(prompt, completion, accepted, wrong))


def _total(part: Mapping[str, float]) -> float:
    form = (part["length"] * part["single"] * part["ending"]) ** (1 / 3)
    return part["correct"] * form * part["sound"]


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Sequence[str]] | None = None,
    wrong: Sequence[Sequence[str]] | None = None,
    log_extra: Callable[[str, list[float]], None] | None = None,
    **_: Any,
) -> list[float]:
    """The scores of ``completions``, in TRL's form: prompts and completions are strings or conversations.

    What a score is made of goes to ``log_extra``, with the samples of a run.

    Raises:
        RewardError: the data set has no column ``answer``. (The column ``wrong`` may be missing.)
    """
    if answer is None:
        raise RewardError(
            'the reward "one_sentence" needs a column "answer", the list of accepted terms of each prompt, '
            'as in {"prompt": "What is a violin?", "answer": ["instrument"]}'
        )
    rows = zip(prompts, completions, answer, wrong or [()] * len(answer), strict=True)
    found = [
        parts(text_of(prompt), text_of(completion), right, not_right) for prompt, completion, right, not_right in rows
    ]
    if log_extra is not None and found:
        for name in found[0]:
            log_extra(name, [one[name] for one in found])
    return [_total(part) for part in found]
