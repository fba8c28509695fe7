"""Answer with a list of exactly three short items, one a line, and nothing else.

reward = count * listed * short * fresh              each in [0, 1]; a perfect answer scores exactly 1

count   1 for three lines, 3/n for n more than that, (n/3)^2 for fewer
listed  the mean over the lines of 1 if the line begins with a bullet or a number, else 1/2
short   the mean over the lines of 1 for up to three words, 3/n for n more
fresh   the part of the items that differ
"""

import re

_BULLET = re.compile(r"^(?:[-*•+]|\d+[.)]) *(?=\w)")


def score(text: str) -> float:
    """The reward of one answer, in [0, 1]."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return 0.0
    number = len(lines)
    count = 3 / number if number >= 3 else (number / 3) ** 2
    listed = sum(1.0 if _BULLET.match(line) else 0.5 for line in lines) / number
    items = [_BULLET.sub("", line) for line in lines]
    short = sum(min(1.0, 3 / max(1, len(item.split()))) for item in items) / number
    return count * listed * short * len({item.lower() for item in items}) / number
