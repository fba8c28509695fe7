"""No score of gsm8k depends on a clock: what math-verify gets is bounded, and it has no time limit."""

import signal
import threading
import time

import pytest

from eggroll.llm.tasks import gsm8k

math_verify = pytest.importorskip("math_verify", reason="math-verify is not installed")


@pytest.mark.parametrize("link", ["/9", r"\div 9", "/(9/9)", "/{9}", r"\frac{1}{9}/"])
def test_long_chains_of_divisions_are_wrong_unread(link, monkeypatch):
    """Each division doubles math-verify's time: seven of them took a second, the longest chain that fits hours."""
    monkeypatch.setattr(gsm8k, "require", lambda *_, **__: pytest.fail("math-verify was asked"))
    for count in (6, 12, 20):
        answer = ("1 1" + link * count)[: gsm8k.MAX_CHARACTERS]
        assert not gsm8k.is_correct.__wrapped__(answer, "72")
        assert not gsm8k.is_correct.__wrapped__("72", answer)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        (r"1 \frac{1}{2}", "1.5", True),
        (r"71 \frac{2}{2}", "72", True),
        ("1 1/9/9/9/9/9", "2", False),
        ("1 1/2", "2.5", False),
        (r"3 \dfrac{1}{4}", "13/4", True),
    ],
)
def test_what_math_verify_decides_has_no_time_limit(answer, gold, right, monkeypatch, caplog):
    def no_clock(*_):
        raise AssertionError("a timer was set")

    found = []

    def ask():
        found.append(gsm8k.is_correct.__wrapped__(answer, gold))

    with monkeypatch.context() as patch:
        for name in ("alarm", "setitimer"):
            if hasattr(signal, name):
                patch.setattr(signal, name, no_clock)
        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert found == [right, right]
    assert not caplog.records


def test_the_worst_that_is_left():
    gsm8k.is_correct.__wrapped__("1 1/2", "2")  # loads it
    start = time.process_time()
    for answer in (
        "1 1/9/9/9/9/9",
        r"1 1\div 9\div 9\div 9\div 9\div 9",
        "(1 1/21/7/3/9/11",
        r"7.25\frac{1}{2}1-1}/9\right)",
        "1 2" + "*9" * 38,
        "1 " * 38 + "2",
    ):
        assert not gsm8k.is_correct.__wrapped__(answer, "72")
    assert time.process_time() - start < 5
