"""Measure a model: bits per byte of held-out text, the baselines to compare with, and samples of text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from eggroll.core import threefry
from eggroll.core.address import parameter_key
from eggroll.pretrain.engines.base import LOGITS, Engine, run_center
from eggroll.pretrain.model import fixed_point
from eggroll.pretrain.model.fixed_point import LOGIT_OFFSET, ONE

LANE = 1024
"""Bytes of a lane: held-out text is read in lanes side by side, each from a state of zeros."""
LANES_AT_ONCE = 96
SAMPLES_NAME = "pretrain/samples"


def bits_of_logits(logits: NDArray[np.int8], targets: NDArray[np.uint8]) -> NDArray[np.float64]:
    """``-log2 p(target)`` with ``p ~ 2^(y / 16)``, exact where the fitness has tables.

    Args:
        logits: ``(..., V)`` int8.
        targets: ``(...)``.

    Returns:
        ``(...)`` float64, bits.
    """
    powers = np.exp2((np.arange(256) - 128) / ONE)
    total = powers[logits.astype(np.int64) + LOGIT_OFFSET].sum(axis=-1)
    chosen = np.take_along_axis(logits, targets.astype(np.int64)[..., None], axis=-1)[..., 0]
    return np.log2(total) - chosen / ONE


def bits_per_byte(engine: Engine, stream: NDArray[np.uint8], limit: int | None = None) -> tuple[float, int]:
    """The model's bits per byte on a text, and how many bytes were predicted.

    The text is cut into lanes of 1024 bytes, each read from a state of zeros and predicted from its second byte on.

    Args:
        engine: the model.
        stream: ``(n,)`` bytes, at least two.
        limit: read only about so many, in lanes spread evenly over the text; ``None`` reads all.
    """
    total, count = 0.0, 0
    for lanes in lanes_of(stream, limit):
        found = run_center(engine, lanes, outputs=LOGITS)
        assert found.logits is not None
        for logits, targets in zip(found.logits, lanes[:, 1:], strict=True):  # all at once would take eight times more
            total += float(bits_of_logits(logits, targets).sum())
        count += lanes[:, 1:].size
    return total / count, count


def lanes_of(stream: NDArray[np.uint8], limit: int | None = None) -> Iterator[NDArray[np.uint8]]:
    """The lanes ``(count, length + 1)`` that :func:`bits_per_byte` reads, as many at once as fit comfortably.

    Without a limit what is left at the end is a shorter lane of its own.
    """
    length = min(LANE, len(stream) - 1)
    starts = np.arange(0, len(stream) - length, length)
    rest = int(starts[-1]) + length
    if limit is not None and limit < length * len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, max(1, limit // length)).astype(np.int64)]
    for first in range(0, len(starts), LANES_AT_ONCE):
        yield np.stack([stream[start : start + length + 1] for start in starts[first : first + LANES_AT_ONCE]])
    if limit is None and len(stream) - rest > 1:
        yield np.asarray(stream[rest:])[None]


def baseline_bits(train: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> dict[str, float]:
    """Bits per byte of the unigram and the bigram baseline: counts of bytes and of pairs of bytes, plus one each.

    Args:
        train: ``(n,)`` bytes that are counted.
        held_out: ``(m,)`` bytes that are predicted, from the second one on.
    """
    single = np.bincount(train, minlength=256) + 1.0
    after = np.bincount(train[:-1].astype(np.int64) * 256 + train[1:], minlength=1 << 16).reshape(256, 256) + 1.0
    following = held_out[1:].astype(np.int64)
    unigram = -np.log2(single / single.sum())[following].mean()
    order_1 = -np.log2(after / after.sum(axis=1, keepdims=True))[held_out[:-1].astype(np.int64), following].mean()
    return {"unigram_bits_per_byte": float(unigram), "order_1_bits_per_byte": float(order_1)}


def sample(engine: Engine, prompt: bytes, length: int, *, temperature: float = 1.0, seed: int = 0) -> bytes:
    """Text that the model generates after a prompt, drawn in whole numbers: the same bytes on every machine.

    The weight of a byte is ``EXP2[255 + round((y - max y) / temperature)]``, or the table's first entry below it.

    Args:
        engine: the model.
        prompt: may be empty; it is read after the byte that begins a document.
        length: bytes to write.
        temperature: 0 takes the most likely byte each time.
        seed: of the draws.
    """
    read = np.frombuffer(b"\0" + prompt, np.uint8)
    found = run_center(engine, np.append(read, np.uint8(0))[None], outputs=("logits", "state"))
    key, made = parameter_key(seed, SAMPLES_NAME), bytearray()
    for word in threefry.random_bits(key, length):
        assert found.logits is not None
        logits = found.logits[0, -1].astype(np.int64)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            below = np.rint((logits - logits.max()) / temperature)
            weights = fixed_point.exp2_table()[np.maximum(0, 255 + below).astype(np.int64)].astype(np.int64)
            cumulative = weights.cumsum()
            token = int(np.searchsorted(cumulative, (int(word) * int(cumulative[-1])) >> 32, side="right"))
        made.append(token)
        window = np.array([[token, 0]], np.uint8)
        found = run_center(engine, window, found.state, outputs=("logits", "state"))
    return bytes(made)
