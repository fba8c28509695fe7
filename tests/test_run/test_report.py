"""The report: self-contained, safe to open, and there for runs in any state."""

from __future__ import annotations

import base64
import gzip
import json
import re

import plotly.graph_objects
import pytest
import torch
from test_run.pages import page_of, plots_of
from test_run.toys import train

from eggroll.errors import ConfigError, MissingExtraError
from eggroll.run import RunDir
from eggroll.run.console import number
from eggroll.run.report import before_and_after, page, write_comparison, write_report
from eggroll.run.report.plots import MAX_POINTS
from eggroll.run.report.view import RunView

GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")


def sample(generation, prompt, completion, reward=0.0, member=-1, split="heldout", **more):
    return {
        **{"generation": generation, "member": member, "prompt": prompt, "completion": completion},
        **{"reward": reward, "split": split},
        **more,
    }


def report_of(run, **options):
    path = write_report(run, **options)
    assert path == run.path / "report.html"
    return page_of(path)


@pytest.fixture
def sampled(five):
    five.append_metrics(
        {
            **{"generation": 5, "heldout_reward": -0.5, "members_per_s": 4.0, "elapsed_s": 75.0, "update_norm": 0.5},
            **{"update_cosine": 0.1, "memory_bytes": 3 * 2**30, "tokens_per_s": 1234.0, "fitness_mean": 0.7},
            **{"invalid_scores": 2, "scores": 8, "fitness_min": 0.1, "fitness_max": 0.9, "fitness_std": 0.2},
        }
    )
    five.append_samples([sample(0, "Why?", "Because, well, you see.", -2.0), sample(5, "Why?", "Because.", -0.5)])
    return five


def test_it_has_everything(sampled):
    found = report_of(sampled, load_line='AutoModelForCausalLM.from_pretrained("runs/demo/model")')
    for expected in (
        "eggroll run demo",
        "5 of 10",
        "The run is not finished: 5 of 10 generations. Continue it with --resume.",
        "-2.000 → -0.5000",
        "best held-out reward, after generation 5",
        "1m 15s",
        "3.0 GiB",
        "1.2k",
        "25 %",
        "scores that failed",
        "reward on held-out prompts",
        "fitness of the population",
        "spread: standard deviation of the members' scores",
        "step size: norm of the update",
        "cosine of an update and the one before",
        "tokens per second",
        "memory of the process, GiB",
        "scores that failed, percent",
        "Because, well, you see.",
        "reward -2.000, generation 0",
        "+1.500",
        "Because.",
        "reward -0.5000, generation 5",
        'AutoModelForCausalLM.from_pretrained("runs/demo/model")',
        f"eggroll replay {sampled.path} --to 5",
        "noise_version",
        "sigma",
    ):
        assert expected in found.text, expected


def test_it_needs_nothing_from_outside_and_a_browser_may_load_nothing(sampled):
    found = report_of(sampled)
    assert found.addresses == []
    assert found.handlers == []
    assert found.elements.count("script") == 3
    assert "link" not in found.elements
    text = (sampled.path / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ")
    allowed = re.search(r"script-src (.*)", policy)[1].split()
    assert len(allowed) == 2
    assert all(source.startswith("'sha256-") for source in allowed)


def test_plotly_is_in_it(sampled):
    text = write_report(sampled).read_text()
    packed = re.search(r'id="plotly">([^<]*)<', text)[1]
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(packed))[:200]
    assert len(text) < 2.5e6


def test_what_is_plotted_are_figures_of_plotly(sampled):
    drawn = plots_of(write_report(sampled))
    assert len(drawn) >= 8
    for plot in drawn:
        for trace in plot["traces"]:
            assert len(trace["y"]) == len(trace["x"]["generation"]) == len(trace["x"]["time"]) > 0
            plotly.graph_objects.Scatter(x=trace["x"]["generation"], y=trace["y"], name=trace["name"])
    heldout = drawn[0]
    assert heldout["traces"][0]["y"] == [-2.0, -0.5]
    assert heldout["traces"][0]["x"] == {"generation": [0, 5], "time": [0.0, 75.0], "steps": [0.0, 0.0]}
    assert heldout["lines"] == [{"y": -2.0, "text": "at the start"}]


def test_hostile_text_is_shown_and_not_run(tmp_path):
    evil = "</td></script><script>alert('x')</script><img src=x onerror=alert(1)> & $title ${cards}"
    run = RunDir.create(tmp_path / "<b>run", {"generations": 1, "prompt": evil, evil: evil}, command=["eggroll", evil])
    logged = {"logged": {evil: evil}}
    run.append_samples([sample(0, evil, evil, **logged), sample(1, evil, [{"role": evil, "content": evil}], **logged)])
    run.append_metrics({"generation": 1, "fitness_mean": 1.0, evil: 1.0})
    pages = [
        report_of(run, load_line=evil, defaults={"prompt": evil + "!", evil: evil}),
        page_of(write_comparison([RunView(run, evil, {}, evil), RunView(run, "b")], tmp_path / "both.html")),
    ]
    for found in pages:
        assert found.elements.count("script") == 3
        assert not {"img", "b>"} & set(found.elements)
        assert found.handlers == []
        assert found.text.count("<script>alert('x')</script>") >= 6
        assert "$title ${cards}" in found.text


@pytest.mark.parametrize("total", [10, None])
def test_a_run_without_any_generation(tmp_path, total):
    run = RunDir.create(tmp_path / "r", {"generations": total} if total else {})
    text = report_of(run).text
    assert "No generation is finished yet." in text
    assert "No samples were logged." in text
    assert "No model was saved. The weights after 0 generations can be rebuilt as shown here." in text


def test_a_run_killed_in_the_middle_of_a_line(sampled):
    for name in ("metrics.jsonl", "samples.jsonl", "updates.jsonl"):
        path = sampled.path / name
        path.write_bytes(path.read_bytes()[:-5])
    assert "4 of 10" in report_of(sampled).text


def test_nan_scores_do_not_stop_it(run):
    nan = float("nan")
    run.append_metrics({"generation": 1, "fitness_mean": nan, "fitness_std": 1.0, "heldout_reward": nan})
    run.append_metrics({"generation": 2, "fitness_mean": 1.0, "fitness_min": nan, "fitness_max": 2.0})
    run.append_samples([sample(0, "p", "c", nan)])
    assert "reward none, generation 0" in report_of(run).text


def test_a_finished_run_has_no_note(five):
    five.update_config({**five.config, "generations": 5})
    assert "not finished" not in report_of(five).text


def test_a_run_that_was_ended_before_its_last_generation(five):
    five.write_file("result.json", b'{"generations": 5, "solved": true}')
    text = report_of(five).text
    assert "The run ended after 5 of 10 generations: its goal was reached, or its budget used up." in text
    five.write_file("result.json", b"[" * 100_000)
    assert "The run is not finished: 5 of 10" in report_of(five).text


def test_bits_per_byte_are_better_when_they_are_fewer_and_text_is_shown_over_time(run):
    for generation, bits in ((0, 8.0), (1, 5.0), (2, 6.0)):
        run.append_metrics({"generation": generation, "heldout_reward": -bits, "validation_bits_per_byte": bits})
        run.append_samples([sample(generation, "the", f"cat {generation}", -bits)])
    run.write_file("result.json", b'{"unigram_bits_per_byte": 4.5, "bigram_bits_per_byte": "none"}')
    text = report_of(run).text
    assert "8.000 → 6.000" in text
    assert "best bits per byte, after generation 1" in text
    assert text.index("6.000 bits per byte") < text.index("cat 2") < text.index("cat 1") < text.index("cat 0")
    assert "Text over time" in text
    assert '<b class="up">8.000 → 6.000' in (run.path / "report.html").read_text()
    drawn = plots_of(run.path / "report.html")
    assert drawn[0]["lines"] == [{"y": 8.0, "text": "at the start"}, {"y": 4.5, "text": "bytes alone (unigram)"}]


def test_checkpoints_are_mentioned_when_no_model_was_saved(five):
    five.save_checkpoint(5, {"w": torch.zeros(1)}, {})
    assert f"the last checkpoints are in {five.checkpoints}" in report_of(five).text


def test_before_and_after_pairs_the_first_and_the_last_of_each_prompt_and_begins_with_what_changed_most():
    conversation = [{"role": "user", "content": "hi"}]
    samples = [
        sample(0, "a", "a0", 0.5),
        sample(0, "only once", "o0"),
        sample(0, "still", "s0"),
        sample(0, conversation, "c0"),
        sample(0, "worse", "w0", 1.0),
        sample(3, "a", "a3", 0.9),
        sample(6, "a", "a6", 0.7),
        sample(6, "still", "s0"),
        sample(6, conversation, "c6"),
        sample(6, "worse", "w6", 0.0),
        sample(6, "train", "t6", split="train"),
        sample(6, "a", "member's", member=4, split="train"),
    ]
    pairs = [(c.prompt, c.before["completion"], c.after and c.after["completion"]) for c in before_and_after(samples)]
    assert pairs == [
        ("worse", "w0", "w6"),
        ("a", "a0", "a6"),
        (conversation, "c0", "c6"),
        ("still", "s0", "s0"),
        ("only once", "o0", None),
    ]


def test_without_held_out_samples_others_are_compared():
    members = [sample(generation, "a", str(generation), member=2, split="train") for generation in (1, 4)]
    assert before_and_after(members)[0].after["completion"] == "4"
    centre = [sample(generation, "b", "x", split="train") for generation in (1, 2)]
    assert [comparison.prompt for comparison in before_and_after(members + centre)] == ["b"]
    assert before_and_after([]) == []


def test_the_parts_of_a_reward_are_shown_and_those_that_changed_are_marked(run):
    before, after = {"correct": 1.0, "length": 0.25, "note": "x"}, {"correct": 1.0, "length": 0.5, "note": "x"}
    run.append_samples([sample(0, "p", "a", 0.25, logged=before), sample(9, "p", "b", 0.5, logged=after)])
    text = write_report(run).read_text()
    assert text.count("<span>correct <b>1</b></span>") == 2
    assert "<span>length <b>0.25</b></span>" in text
    assert '<span class="moved">length <b>0.5</b></span>' in text
    assert text.count("<span>note <b>x</b></span>") == 2


def test_many_prompts_and_long_texts_are_cut(run):
    run.append_samples([sample(0, f"prompt {index}", "y" * 10_000) for index in range(50)])
    text = report_of(run).text
    assert "30 of 50 prompts; all are in samples.jsonl." in text
    assert len(re.findall("y{4000} …", text)) == 30
    assert "y" * 4001 not in text


def test_long_runs_are_thinned(run):
    lines = [f'{{"generation": {number}, "fitness_mean": {number}}}\n' for number in range(1, 10_001)]
    (run.path / "metrics.jsonl").write_text("".join(lines))
    trace = plots_of(write_report(run))[0]["traces"][0]
    assert len(trace["y"]) <= MAX_POINTS + 1
    assert trace["y"][-1] == 10_000.0


def test_it_is_the_same_each_time(sampled):
    first = write_report(sampled).read_bytes()
    assert write_report(sampled).read_bytes() == first


def test_without_plotly_it_says_how_to_install_it(sampled, monkeypatch):
    def missing(module, *, extra):
        raise MissingExtraError(f"{module} {extra}")

    monkeypatch.setattr(page, "require", missing)
    page._plotly.cache_clear()
    with pytest.raises(MissingExtraError, match=r"plotly\.offline report"):
        write_report(sampled)


def test_a_run_without_plotly_ends_with_a_warning(tmp_path, monkeypatch):
    def missing(module, *, extra):
        raise MissingExtraError("install plotly")

    monkeypatch.setattr(page, "require", missing)
    page._plotly.cache_clear()
    with pytest.warns(UserWarning, match=r"report\.html was not written: install plotly"):
        trained = train(output=str(tmp_path / "run"))
    assert trained.generation == 3
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_time_is_that_of_all_sessions(run):
    for generation, seconds in enumerate([30.0, 60.0, 20.0, 40.0, 15.0], start=1):
        run.append_metrics({"generation": generation, "elapsed_s": seconds, "fitness_mean": 1.0})
    assert "1m 55s" in report_of(run).texts  # 60 + 40 + 15 seconds
    assert plots_of(run.path / "report.html")[0]["traces"][0]["x"]["time"] == [30.0, 60.0, 80.0, 100.0, 115.0]


def test_settings_that_are_not_the_defaults_are_marked(tmp_path):
    options = {"lr": 0.5, "rank": 8, "betas": [0.9, 0.999]}
    run = RunDir.create(tmp_path / "r", {"generations": 3, "options": options})
    text = write_report(run, defaults={"lr": 0.001, "rank": 8, "betas": (0.9, 0.999)}).read_text()
    assert '<tr class="changed"><td>lr</td><td>0.5</td><td>0.001</td></tr>' in text
    assert text.count('class="changed"') == 1
    assert "3 other settings" in text
    assert '<tr class="changed">' not in write_report(run).read_text()


def test_an_episode_is_shown_where_there_is_one(tmp_path):
    run = RunDir.create(tmp_path / "r", {"kind": "rl", "options": {"env": "CartPole-v1", "generations": 1}})
    run.append_metrics({"generation": 1, "fitness_mean": 9.0, "env_steps": 40.0, "heldout_reward": 8.0})
    run.environment["solved_return"] = 475.0
    assert "There is no animation: the environment cannot draw itself" in report_of(run).text
    (run.path / "episode.gif").write_bytes(GIF)
    found = report_of(run)
    assert found.addresses == [f"data:image/gif;base64,{base64.b64encode(GIF).decode()}"]
    assert "over environment steps" in found.text
    first = plots_of(run.path / "report.html")[0]
    assert [trace["name"] for trace in first["traces"]] == ["return", "members, mean"]
    assert {"y": 475.0, "text": "solved"} in first["lines"]
    (run.path / "episode.gif").write_bytes(b"<script>")
    assert "is no animation that can be shown here" in report_of(run).text


def test_several_runs_on_one_page(sampled, tmp_path, record):
    other = RunDir.create(tmp_path / "other", {"generations": 2, "sigma": 0.5})
    other.append_metrics({"generation": 1, "heldout_reward": -1.0, "fitness_mean": 0.3, "elapsed_s": 9.0})
    other.append_samples([sample(0, "Why?", "So.", -2.0), sample(1, "Why?", "Therefore.", -1.0)])
    views = [RunView(sampled, "demo", load_line="first()"), RunView(other, "other")]
    path = write_comparison(views, tmp_path / "both.html")
    found = page_of(path)
    for expected in ("eggroll: 2 runs", "demo", "other", "Because.", "Therefore.", "first()", "0.01", "0.5", "5 of 10"):
        assert expected in found.text, expected
    assert [trace["name"] for trace in plots_of(path)[0]["traces"]] == ["demo", "other"]
    assert "layers" in found.text  # a setting of one of them
    with pytest.raises(ConfigError, match="a page compares at most 8 runs, and 9 were given; leave some out"):
        write_comparison([RunView(sampled, str(number)) for number in range(9)], path)


def test_what_was_chosen_is_shown_with_what_was_measured(sampled):
    path = sampled.path / "environment.json"
    about = json.loads(path.read_text())
    levels = [{"sigma": 0.01, "mean": 0.5, "deviation": 0.125, "noise": 0.0625, "members": 16}]
    path.write_text(json.dumps(about | {"chosen": {"lines": ["sigma 0.01 (of <1> tried)"], "levels": levels}}))
    report_of(RunDir.open(sampled.path))  # is well-formed
    text = (sampled.path / "report.html").read_text()
    assert "Chosen before the run" in text
    assert "<li>sigma 0.01 (of &lt;1&gt; tried)</li>" in text
    row = "".join(f"<td>{value}</td>" for value in map(number, (0.01, 0.5, 0.125, 0.0625)))
    assert f"<tr>{row}</tr>" in text
    path.write_text(json.dumps(about | {"chosen": {"lines": [3, None], "levels": "all"}}))  # somebody's file
    assert "Chosen before the run" not in report_of(RunDir.open(sampled.path)).text
