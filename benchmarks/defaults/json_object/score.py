"""Answer with a JSON object of the keys "name", "color" and "size", and nothing else.

reward = (share * whole)^(1/2) * alone               each in [0, 1]; a perfect answer scores exactly 1

share   the part of the three keys that have a text of one to four words as their value; each further key costs 1/4
whole   1 if the object can be parsed, 1/4 if only its pairs can be found, as in one that is cut off
alone   the part of the answer's characters that belong to the object, squared; a code fence around it is free
"""

import json
import re

KEYS = ("name", "color", "size")
_FENCE = re.compile(r"^```(?:json)?\s*|\s*```$")
_PAIR = re.compile(r'"(\w+)"\s*:\s*("(?:[^"\\\n]|\\.)*"|[\d.]+|true|false|null)')


def score(text: str) -> float:
    """The reward of one answer, in [0, 1]."""
    answer = _FENCE.sub("", text.strip()).strip()
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0:
        return 0.0
    inside = answer[start : end + 1] if end > start else answer[start:]
    try:
        found, whole = json.loads(inside), 1.0
    except ValueError:
        found, whole = dict(_PAIR.findall(inside)), 0.25
        found = {key: value.strip('"') for key, value in found.items()}
    good = sum(_fits(found.get(key)) for key in KEYS) / len(KEYS)
    share = good * max(0.0, 1.0 - 0.25 * len(set(found) - set(KEYS)))
    alone = len(inside) / len(answer)
    return (share * whole) ** 0.5 * alone**2


def _fits(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value.split()) <= 4
