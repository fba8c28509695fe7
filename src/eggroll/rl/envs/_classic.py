"""Pictures of classic control, drawn with Pillow: gymnax leaves them to gymnasium, which takes half a second each."""

from __future__ import annotations

from math import cos, pi, sin
from typing import Any

import numpy as np

from eggroll._optional import require

WIDTH, HEIGHT = 300, 200
CLASSIC = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")


def draw(id: str, state: Any) -> Any:
    """The ``(200, 300, 3)`` uint8 image of a state of one of ``CLASSIC``."""
    image = require("PIL.Image", extra="rl").new("RGB", (WIDTH, HEIGHT), "white")
    pen = require("PIL.ImageDraw", extra="rl").Draw(image)
    if id == "CartPole-v1":
        x, y = WIDTH / 2 + float(state.x) * 60, HEIGHT * 0.75
        pen.line((0, y, WIDTH, y), fill="black")
        pen.rectangle((x - 20, y - 10, x + 20, y + 10), fill="black")
        _rods(pen, (x, y - 10), [(float(state.theta), 60.0)])
    elif id == "Pendulum-v1":
        # the angle is zero at the top and grows to the left
        _rods(pen, (WIDTH / 2, HEIGHT / 2), [(-float(state.theta), 80.0)])
    elif id == "Acrobot-v1":
        # angles are zero hanging down, the second one relative to the first; the goal is the line
        pen.line((0, HEIGHT / 2 - 40, WIDTH, HEIGHT / 2 - 40), fill="gray")
        first = pi - float(state.joint_angle1)
        _rods(pen, (WIDTH / 2, HEIGHT / 2), [(first, 40.0), (first - float(state.joint_angle2), 40.0)])
    else:
        places = [*np.linspace(-1.2, 0.6, 100), float(state.position)]
        points = [((x + 1.2) / 1.8 * WIDTH, HEIGHT * (0.9 - 0.7 * (sin(3 * x) * 0.45 + 0.55))) for x in places]
        pen.line(points[:-1], fill="black")
        x, y = points[-1]
        pen.ellipse((x - 8, y - 14, x + 8, y + 2), fill="firebrick")
    return image


def _rods(pen: Any, start: tuple[float, float], rods: list[tuple[float, float]]) -> None:
    """Rods one after the other, each an angle (clockwise from upright) and a length in pixels."""
    x, y = start
    for angle, length in rods:
        end = x + length * sin(angle), y - length * cos(angle)
        pen.line((x, y, *end), fill="peru", width=8)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="slateblue")
        x, y = end
