"""Reply to what somebody says with one short question, and nothing else.

reward = asks * single * length * fresh              each in [0, 1]; a perfect answer scores exactly 1

asks    1 if the answer ends in a question mark, 1/2 if there is one before its end, 1/8 without any
single  1/(number of sentences)
length  1 for 4 to 12 words, 12/n for n more, (n/4)^2 for fewer
fresh   the part of the words that differ, times 1/2 if the answer does not begin with a capital letter
"""

import re

_STOP = re.compile(r"[.!?]+(?=\s|$)|\n+")


def score(text: str) -> float:
    """The reward of one answer, in [0, 1]."""
    answer = text.strip().strip("\"'“”").strip()
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", answer.lower())
    if not words:
        return 0.0
    asks = 1.0 if answer.endswith("?") else 0.5 if "?" in answer else 0.125
    sentences = [part for part in _STOP.split(answer) if re.search(r"\w", part)]
    number = len(words)
    length = min(1.0, 12 / number) if number >= 4 else (number / 4) ** 2
    fresh = len(set(words)) / number * (1.0 if answer[0].isupper() else 0.5)
    return (asks / max(1, len(sentences)) * length) ** 0.5 * min(1.0, fresh / 0.8)
