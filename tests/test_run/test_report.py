"""The report: self-contained, safe to open, and there for runs in any state."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from eggroll.errors import MissingExtraError
from eggroll.run import RunDir, curves
from eggroll.run.report import before_and_after, write_report

VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects texts, addresses and scripts."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.texts = []
        self.addresses = []
        self.elements = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def sample(generation, prompt, completion, reward=0.0, member=-1, split="heldout"):
    return {
        **{"generation": generation, "member": member, "prompt": prompt, "completion": completion},
        **{"reward": reward, "split": split},
    }


def page_of(run, **options):
    path = write_report(run, **options)
    assert path == run.path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def sampled(five):
    five.append_metrics({"generation": 5, "heldout_reward": -0.5, "members_per_s": 4.0, "elapsed_s": 75.0})
    five.append_samples([sample(0, "Why?", "Because, well, you see.", -2.0), sample(5, "Why?", "Because.", -0.5)])
    return five


def test_it_has_everything(sampled):
    page = page_of(sampled, load_line='AutoModelForCausalLM.from_pretrained("runs/demo/model")')
    text = "\n".join(page.texts)
    for expected in (
        "eggroll run demo",
        "5 of 10",
        "The run is not finished: 5 of 10 generations. Continue it with --resume.",
        "-2.000 → -0.5000",
        "best held-out reward, after generation 5",
        "1m 15s",
        "reward on held-out prompts",
        "fitness of the population",
        "Because, well, you see.",
        "reward -2.000, generation 0",
        "Because.",
        "reward -0.5000, generation 5",
        'AutoModelForCausalLM.from_pretrained("runs/demo/model")',
        f"eggroll replay {sampled.path} --to 5",
        "noise_version",
        "sigma",
    ):
        assert expected in text, expected


def test_it_needs_nothing_from_outside(sampled):
    page = page_of(sampled)
    assert page.addresses == []
    assert "script" not in page.elements
    assert "link" not in page.elements
    assert page.elements.count("svg") >= 2
    assert "url(http" not in (sampled.path / "report.html").read_text()


def test_hostile_text_is_shown_and_not_run(tmp_path):
    evil = "</td><script>alert('x')</script><img src=x onerror=alert(1)> & $title ${cards}"
    run = RunDir.create(tmp_path / "<b>run", {"generations": 1, "prompt": evil}, command=["eggroll", evil])
    run.append_samples([sample(0, evil, evil), sample(1, evil, [{"role": evil, "content": evil}])])
    run.append_metrics({"generation": 1, "fitness_mean": 1.0, evil: 1.0})
    page = page_of(run, load_line=evil)
    assert not {"script", "img", "b>"} & set(page.elements)
    text = "".join(page.texts)
    assert text.count("<script>alert('x')</script>") >= 6
    assert "$title ${cards}" in text


@pytest.mark.parametrize("total", [10, None])
def test_a_run_without_any_generation(tmp_path, total):
    run = RunDir.create(tmp_path / "r", {"generations": total} if total else {})
    text = "\n".join(page_of(run).texts)
    assert "No generation is finished yet." in text
    assert "No samples were logged." in text
    assert "No model was saved. The weights after 0 generations can be rebuilt as shown here." in text


def test_a_run_killed_in_the_middle_of_a_line(sampled):
    for name in ("metrics.jsonl", "samples.jsonl", "updates.jsonl"):
        path = sampled.path / name
        path.write_bytes(path.read_bytes()[:-5])
    assert "4 of 10" in "\n".join(page_of(sampled).texts)


def test_nan_scores_do_not_stop_it(run):
    nan = float("nan")
    run.append_metrics({"generation": 1, "fitness_mean": nan, "fitness_std": 1.0, "heldout_reward": nan})
    run.append_metrics({"generation": 2, "fitness_mean": 1.0, "fitness_min": nan, "fitness_max": 2.0})
    run.append_samples([sample(0, "p", "c", nan)])
    assert "reward none, generation 0" in "\n".join(page_of(run).texts)


def test_a_finished_run_has_no_note(five):
    five.update_config({**five.config, "generations": 5})
    assert "not finished" not in "\n".join(page_of(five).texts)


def test_a_run_that_was_ended_before_its_last_generation(five):
    five.write_file("result.json", b'{"generations": 5, "solved": true}')
    text = "\n".join(page_of(five).texts)
    assert "The run ended after 5 of 10 generations: its goal was reached, or its budget used up." in text
    five.write_file("result.json", b"[" * 100_000)
    assert "The run is not finished: 5 of 10" in "\n".join(page_of(five).texts)


def test_bits_per_byte_are_better_when_they_are_fewer(run):
    for generation, bits in ((0, 8.0), (1, 5.0), (2, 6.0)):
        run.append_metrics({"generation": generation, "heldout_reward": -bits, "validation_bits_per_byte": bits})
        run.append_samples([sample(generation, "the", "cat", -bits)])
    page = page_of(run)
    text = "\n".join(page.texts)
    assert "8.000 → 6.000" in text
    assert "best bits per byte, after generation 1" in text
    assert "8.000 bits per byte, generation 0" in text
    assert '<b class="up">8.000 → 6.000' in (run.path / "report.html").read_text()
    assert page.elements.count("svg") == 1


def test_checkpoints_are_mentioned_when_no_model_was_saved(five):
    five.save_checkpoint(5, {"w": torch.zeros(1)}, {})
    assert f"the last checkpoints are in {five.checkpoints}" in "\n".join(page_of(five).texts)


def test_before_and_after_pairs_the_first_and_the_last_of_each_prompt():
    conversation = [{"role": "user", "content": "hi"}]
    samples = [
        sample(0, "a", "a0"),
        sample(0, "only once", "o0"),
        sample(0, conversation, "c0"),
        sample(3, "a", "a3"),
        sample(6, "a", "a6"),
        sample(6, conversation, "c6"),
        sample(6, "train", "t6", split="train"),
        sample(6, "a", "member's", member=4, split="train"),
    ]
    pairs = [(c.prompt, c.before["completion"], c.after and c.after["completion"]) for c in before_and_after(samples)]
    assert pairs == [("a", "a0", "a6"), (conversation, "c0", "c6"), ("only once", "o0", None)]


def test_without_held_out_samples_others_are_compared():
    members = [sample(generation, "a", str(generation), member=2, split="train") for generation in (1, 4)]
    assert before_and_after(members)[0].after["completion"] == "4"
    centre = [sample(generation, "b", "x", split="train") for generation in (1, 2)]
    assert [comparison.prompt for comparison in before_and_after(members + centre)] == ["b"]
    assert before_and_after([]) == []


def test_many_prompts_and_long_texts_are_cut(run):
    run.append_samples([sample(0, f"prompt {index}", "y" * 10_000) for index in range(50)])
    text = "\n".join(page_of(run).texts)
    assert "30 of 50 prompts; all are in samples.jsonl." in text
    assert len(re.findall("y{4000} …", text)) == 30
    assert "y" * 4001 not in text


def test_it_is_the_same_each_time(sampled):
    first = write_report(sampled).read_bytes()
    assert write_report(sampled).read_bytes() == first


def test_without_matplotlib_it_says_how_to_install_it(sampled, monkeypatch):
    def missing(module, *, extra):
        raise MissingExtraError(f"{module} {extra}")

    monkeypatch.setattr(curves, "require", missing)
    with pytest.raises(MissingExtraError, match="matplotlib llm"):
        write_report(sampled)


def test_the_time_is_that_of_all_sessions(run):
    for generation, seconds in enumerate([30.0, 60.0, 20.0, 40.0, 15.0], start=1):
        run.append_metrics({"generation": generation, "elapsed_s": seconds})
    assert "1m 55s" in page_of(run).texts  # 60 + 40 + 15 seconds
