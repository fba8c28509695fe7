"""What the benchmarks share: turns, ratios, result files, the summary. No model, and no assertion on time."""

import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("bench_*.py"))


@pytest.fixture
def arguments(common, monkeypatch, tmp_path):
    def arguments(*given):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bench_thing.py", "--results", str(tmp_path), *given])
        return common.begin(common.parser("Things.\n\nMore."))

    return arguments


def test_every_variant_measures_itself_in_every_turn_in_alternating_order(common):
    order = []

    def variant(name):
        def measure():
            order.append(name)
            return float(len(order))

        return measure

    times = common.alternate({"a": variant("a"), "b": variant("b")}, turns=3, warm_up=1)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert times == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}  # the warm-up does not count


def test_the_ratio_is_taken_within_turns(common):
    # A machine that was ten times slower in one turn has the same ratio in it.
    times = {"plain": [1.0, 10.0, 1.2], "population": [2.0, 20.0, 1.2]}
    assert common.ratio(times, "plain", "population") == {"median": 0.5, "min": 0.5, "max": 1.0}


def test_ratio_needs_as_many_of_both(common):
    with pytest.raises(ValueError, match="shorter"):
        common.ratio({"a": [1.0], "b": [1.0, 2.0]}, "b", "a")


def test_seconds_calls_once(common):
    calls = []
    assert common.seconds(lambda: calls.append(1)) > 0
    assert calls == [1]


@pytest.mark.parametrize(
    ("median", "target", "lower", "met"),
    [
        (0.95, 0.95, False, True),
        (0.94, 0.95, False, False),
        (1.10, 1.10, True, True),
        (1.11, 1.10, True, False),
        (0.1, None, False, None),
    ],
)
def test_a_target_is_met_or_not(common, median, target, lower, met):
    figure = {"median": median, "min": 0.0, "max": 2.0}
    assert common.row("case", figure, target=target, lower_is_better=lower)["met"] is met


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel Xeon"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763"),
        ("", "CPU"),
    ],
)
def test_short_names_of_cpus(common, name, short):
    assert common.short_cpu(name) == short


def test_slug(common):
    assert common.slug("AMD EPYC 7763, 2 cores") == "amd-epyc-7763-2-cores"


def test_fewer_turns_than_a_figure_needs_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        arguments("--turns", "4")
    assert "--turns (=4) must be at least 5 for a figure; use --quick for a smoke test" in capsys.readouterr().err


def test_a_missing_gpu_is_said(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        arguments("--device", "cuda")
    assert stop.value.code == 2
    assert f"--device cuda: torch {torch.__version__} sees no CUDA device here" in capsys.readouterr().err


def test_quick_writes_nothing(common, arguments, tmp_path, capsys):
    args = arguments("--quick")
    assert (args.turns, args.members) == (2, 4)
    rows = [common.row("case", common.spread([1.0]), target=2.0)]
    assert common.finish("thing", "a / b", rows, args) is None
    assert list(tmp_path.iterdir()) == []
    assert "no measurements" in capsys.readouterr().out


def test_a_result_file_says_what_ran_where(common, arguments, tmp_path, capsys):
    args = arguments("--members", "8", "--why", "too slow")
    rows = [common.row("case", common.spread([1.0, 3.0, 2.0]), target=2.5, seconds={"plain": [1.0, 3.0, 2.0]})]
    path = common.finish("thing", "a / b", rows, args, members=8)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.parent == tmp_path
    assert path.name.startswith(f"thing_{common.slug(common.hardware())}")
    assert path.name.endswith(f"_{result['date']}.json")
    assert result["rows"][0]["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert (result["rows"][0]["met"], result["why"], result["members"]) == (False, "too slow", 8)
    assert result["command"] == "python benchmarks/bench_thing.py --members 8"
    assert {"hardware", "threads", "load_average_before", "git", "cpu"} <= result.keys()
    assert "2,000.0 ms" in capsys.readouterr().out


def test_a_missed_target_asks_for_the_reason(common, arguments, capsys):
    common.finish("thing", "a / b", [common.row("case", common.spread([1.0]), target=2.0)], arguments())
    assert "a target is missed: say why in a sentence" in capsys.readouterr().out


def test_the_summary_takes_the_newest_and_says_by_how_much_a_target_is_missed(load, common, arguments, tmp_path):
    summary = load("summary")
    args = arguments("--why", "The reason is known.")
    good, bad = common.spread([1.0]), common.spread([0.5])
    rows = [
        common.row("slow", bad, target=1.0),
        common.row("fast", good, target=1.0),
        common.row("aside", common.spread([0.123])),
    ]
    path = common.finish("noise", "a / b", rows, args)
    old = json.loads(path.read_text(encoding="utf-8"))
    old |= {"date": "2001-01-01", "rows": [common.row("outdated", good, target=1.0)]}
    (tmp_path / "noise_zzz_2001-01-01.json").write_text(json.dumps(old), encoding="utf-8")
    results = summary.newest(tmp_path)
    page = summary.page(results)
    assert len(results) == 1
    assert "outdated" not in page
    assert "| Noise: slow | ≥ 1 | 0.500 (0.500 to 0.500) **missed** by 50% |" in page
    assert "| Noise: fast | ≥ 1 | 1.000 (1.000 to 1.000) met |" in page
    assert "The reason is known." in page
    [name] = {summary.machine(result) for result in results}
    own = summary.page_of(name, results)
    assert f"| {name} | 1 of 2 | `benchmarks/results/" in page
    assert "| Noise: slow | ≥ 1 | 0.500 (0.500 to 0.500) | **missed** by 50% |" in own
    assert "| Noise: aside | – | 0.123 (0.123 to 0.123) |" in own


def test_machines_stand_side_by_side(load, common):
    summary = load("summary")
    facts = {
        "what": "noise",
        "measure": "a / b",
        "device": "cpu",
        "threads": 2,
        "date": "2001-01-01",
        "why": "it is so",
    }

    def result(kind, value):
        rows = [common.row("slow", common.spread([value]), target=1.0)]
        cpu = {"model": "C", "cores": 2, "capability": kind}
        return {**facts, "hardware": "C, 2 cores", "cpu": cpu, "rows": rows}

    page = summary.page([result("AVX2", 1.5), result("AMX", 0.5)])
    assert "| what | target | C, 2 cores, AMX | C, 2 cores, AVX2 |" in page
    assert "| Noise: slow | ≥ 1 | 0.500 (0.500 to 0.500) **missed** by 50% | 1.500 (1.500 to 1.500) met |" in page
    assert "- Noise, C, 2 cores, AMX: it is so" in page


def test_only_what_moved_beyond_the_spread_is_said(load, common):
    summary = load("summary")
    ranges = {"same": ([0.9, 1.0, 1.1], [1.0, 1.1, 1.2]), "up": ([1.0, 1.1, 1.2], [1.3, 1.4, 1.5])}
    ranges |= {"down": ([1.0, 1.1, 1.2], [0.7, 0.8, 0.9]), "time": ([1.0, 1.1, 1.2], [0.7, 0.8, 0.9])}
    series = [
        {
            "what": "noise",
            "date": f"2001-01-0{when + 1}",
            "rows": [
                common.row(case, common.spread(values[when]), lower_is_better=case == "time")
                for case, values in ranges.items()
            ],
        }
        for when in (0, 1)
    ]
    lines = summary.moved(series)
    assert [line.split("Noise: ")[1].split(":")[0] for line in lines] == ["up", "down", "time"]
    assert [line.split()[0] for line in lines] == ["better", "WORSE", "better"]
    assert summary.moved(series[:1]) == []


def test_a_summary_of_nothing_says_so(load, monkeypatch, tmp_path):
    summary = load("summary")
    monkeypatch.setattr(sys, "argv", ["summary.py", "--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit, match="holds no results; run `make bench` first"):
        summary.main()


@pytest.mark.parametrize("name", [*SCRIPTS, "summary"])
def test_every_script_explains_itself(load, monkeypatch, capsys, name):
    module = load(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert " ".join(module.__doc__.splitlines()[0].split()) in " ".join(capsys.readouterr().out.split())
