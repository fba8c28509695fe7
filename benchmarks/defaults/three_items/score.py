"""Answer with a list of exactly three items, one a line behind a dash, and nothing else.

    reward = count * dashes * short                      each in [0, 1]; a perfect answer scores exactly 1

    count   1 for three lines, 3/n for n more than that, (n/3)^2 for fewer
    dashes  the part of the lines that are a dash with something behind it; a line that is not counts 1/5 if it begins
            with another bullet or a number, else nothing
    short   the mean over the lines of 1 for up to three words, 3/n for n more; times the part of the items that differ
"""

import re

_ITEM = re.compile(r"^- *(?=\w)")
_OTHER = re.compile(r"^(?:[*•+]|\d+[.)]) *(?=\w)")


def score(text: str) -> float:
    """The reward of one answer, in [0, 1]."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return 0.0
    number = len(lines)
    count = 3 / number if number >= 3 else (number / 3) ** 2
    dashes = sum(1.0 if _ITEM.match(line) else 0.2 if _OTHER.match(line) else 0.0 for line in lines) / number
    items = [_OTHER.sub("", _ITEM.sub("", line)) for line in lines]
    short = sum(min(1.0, 3 / max(1, len(item.split()))) for item in items) / number
    return count * dashes * short * len({item.lower() for item in items}) / number
