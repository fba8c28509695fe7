"""The task ``maze``: walk through rooms to the exit, told only which doors there are.

    score = 1                                                the exit was reached
            0.8 * (start - nearest) / start + 0.1 * form     if not

    start    steps to the exit from the first room
    nearest  steps to the exit from the nearest room that was visited
    form     the part of the turns that name exactly one direction

A maze is a random spanning tree over a grid of rooms, so there is one way between any two of them, and it is the row's
own: ``seed`` and ``size`` make it. The world says after each step which doors the room has and where the exit lies.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from eggroll.errors import DataError
from eggroll.llm.tasks.splits import Splits, fill
from eggroll.llm.tasks.task import CONVERSATION_SETTINGS, CONVERSATION_SIZES
from eggroll.llm.worlds.world import Turn, World

__all__ = ["BEST", "DESCRIPTION", "MAX_TOKENS", "SETTINGS", "SYSTEM", "Maze", "check", "doors_of", "problems", "splits"]

DESCRIPTION = "Walk through a maze, told which doors there are."
MAX_TOKENS = 8
MAX_TURNS = 8
REACH = 6
"""Steps to the exit, at most: two are left for mistakes."""
BEST = 1.0
SYSTEM: str | None = "You walk through a maze. Answer with one word: north, south, east or west."
SETTINGS: dict[str, Any] = {**CONVERSATION_SETTINGS, "max_turns": MAX_TURNS}

SEED = 2027
LARGEST = 32
_STEPS = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}
_WORD = re.compile(r"\b(north|south|east|west)\b", re.IGNORECASE)

Room = tuple[int, int]


class Maze(World):
    """A grid of ``size`` times ``size`` rooms that a row makes with ``seed``.

    The exit is the room farthest away, of those that can be reached in the turns that there are.
    """

    def reset(self, row: Mapping[str, Any]) -> str:
        """Begin in the north-west corner."""
        self.doors = doors_of(int(row["size"]), int(row["seed"]))
        self.room: Room = (0, 0)
        ways = _distances(self.doors, self.room)
        self.exit = max(ways, key=lambda room: (ways[room] if ways[room] <= REACH else 0, room))
        self.ways = _distances(self.doors, self.exit)
        self.start = self.nearest = self.ways[self.room]
        self.turns = self.words = 0
        return self._view()

    def step(self, completion: str) -> Turn:
        """Go where the model says."""
        self.turns += 1
        words = {word.lower() for word in _WORD.findall(completion)}
        if len(words) != 1:
            return self._turn(f"Say one direction. {self._view()}")
        self.words += 1
        way = words.pop()
        if way not in self._open():
            return self._turn(f"There is a wall. {self._view()}")
        self.room = _beside(self.room, way)
        self.nearest = min(self.nearest, self.ways[self.room])
        if self.room == self.exit:
            return Turn("You are out!", done=True, score=1.0)
        return self._turn(self._view())

    def _turn(self, said: str) -> Turn:
        score = 0.8 * (self.start - self.nearest) / self.start + 0.1 * self.words / self.turns
        return Turn(said, done=self.turns >= MAX_TURNS, score=score)

    def _open(self) -> list[str]:
        return [way for way in _STEPS if _beside(self.room, way) in self.doors[self.room]]

    def _view(self) -> str:
        east, south = self.exit[0] - self.room[0], self.exit[1] - self.room[1]
        parts = [("south" if south > 0 else "north") if south else "", ("east" if east > 0 else "west") if east else ""]
        return f"The exit is {' '.join(filter(None, parts))} of you. Doors: {', '.join(self._open())}."


WORLD = Maze


def doors_of(size: int, seed: int) -> dict[Room, set[Room]]:
    """The rooms of a maze and those behind their doors: a random tree over all rooms (a walk that goes back)."""
    rng = random.Random(seed)
    doors: dict[Room, set[Room]] = {(0, 0): set()}
    path: list[Room] = [(0, 0)]
    while path:
        room = path[-1]
        free = [
            other
            for other in (_beside(room, way) for way in _STEPS)
            if other not in doors and 0 <= other[0] < size and 0 <= other[1] < size
        ]
        if not free:
            path.pop()
            continue
        other = free[int(rng.random() * len(free))]
        doors[room].add(other)
        doors[other] = {room}
        path.append(other)
    return doors


def _beside(room: Room, way: str) -> Room:
    return room[0] + _STEPS[way][0], room[1] + _STEPS[way][1]


def _distances(doors: Mapping[Room, set[Room]], start: Room) -> dict[Room, int]:
    found, queue = {start: 0}, deque([start])
    while queue:
        room = queue.popleft()
        for other in doors[room]:
            if other not in found:
                found[other] = found[room] + 1
                queue.append(other)
    return found


def problems(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless problems: pairs of a key and a row ``prompt, size, seed``."""
    rng = random.Random(seed)
    while True:
        size, number = 4 + int(rng.random() * 2), int(rng.random() * 2**31)
        doors = doors_of(size, number)
        key = " ".join(f"{room}:{sorted(others)}" for room, others in sorted(doors.items()))
        yield key, {"prompt": "Find the exit.", "size": size, "seed": number}


def splits() -> Splits:
    """The task's problems."""
    return fill(problems(SEED), CONVERSATION_SIZES)


def check(columns: Mapping[str, Any]) -> None:
    """Refuse a row that is no maze.

    Raises:
        DataError: it has no whole numbers ``size`` and ``seed``, or the size is out of range.
    """
    size, seed = columns.get("size"), columns.get("seed")
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (size, seed))
    if not whole or not 2 <= size <= LARGEST:  # type: ignore[operator]
        raise DataError(
            f"maze needs whole numbers size (2 to {LARGEST}) and seed, got size={size!r} and seed={seed!r}; a row is "
            '{"prompt": "Find the exit.", "size": 4, "seed": 7}'
        )
