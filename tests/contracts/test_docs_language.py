"""The Python of the pages on language models and policies runs too, with tiny models in the place of real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from judge_server import judging
from rwkv7_models import saved_pth
from tiny_models import write_llama

from eggroll.llm import load

ROOT = Path(__file__).parents[2]
NOT_RUN = "# not run: "
"""The first line of a block that no test can run, with the reason."""
RUN_ELSEWHERE = {
    "README.md", "docs/population.md", "docs/functional.md", "docs/trainer.md", "docs/pretrain.md", "docs/jax.md",
    "docs/start.md", "docs/resume.md",
}  # fmt: skip
RUN_HERE = {"docs/tune.md", "docs/tasks.md", "docs/from-trl.md", "docs/serve.md", "docs/rl.md", "docs/rwkv7.md"}
RUN_HERE |= {"docs/report.md", "docs/quantised.md", "docs/judges.md", "docs/worlds.md"}


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if not block.startswith(NOT_RUN)]


def run(page, names, *, changes=()):
    """Run a page's blocks as one program; ``changes`` are (what stands there, what runs instead)."""
    for number, block in enumerate(blocks(page)):
        for old, new in changes:
            block = block.replace(old, new)
        exec(compile(block, f"{page}, example {number + 1}", "exec"), names)
    for old, _ in changes:
        assert any(old in block for block in blocks(page)), f"{page} does not say {old!r} anymore"
    return names


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder to work in, with a tiny model where `eggroll tune -o runs/short` would have left one."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "runs" / "short" / "model")
    return load(str(tmp_path / "runs" / "short" / "model"), dtype="float32")


def test_every_block_runs_in_some_test():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    with_python = {str(page.relative_to(ROOT)) for page in pages if blocks(page.relative_to(ROOT))}
    assert with_python - RUN_ELSEWHERE - RUN_HERE - {"docs/cluster.md"} == set()  # cluster.md: tests/test_distributed


def test_the_page_on_rewards(tiny):
    fewer = [("population_size=32", "population_size=4"), ("generations=20", "generations=2, max_tokens=8")]
    names = run("docs/tune.md", {"tokenizer": tiny.tokenizer, "model": tiny.model}, changes=fewer)
    assert names["score"]("One two three four five six seven eight.") == 2.0
    assert Path("evolved-model/config.json").exists()


def test_the_page_on_judges(tiny, monkeypatch):
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(Path("cache").absolute()))
    with judging() as server:
        smaller = [
            ("http://localhost:8000/v1", server.url),
            ('"smollm2-135m"', '"runs/short/model"'),
            ("population_size=32, generations=20", "population_size=4, generations=2, max_tokens=4"),
        ]
        names = run("docs/judges.md", {}, changes=smaller)
        assert len(names["trainer"].history) == 2
        assert "One polite sentence." in server.requests[0]["messages"][0]["content"]


def test_the_page_on_scripts_for_trl(tiny):
    fewer = [
        ('"smollm2-135m"', '"runs/short/model"'),
        ("population_size=32", "population_size=4"),
        ("generations=20, max_tokens=24", "generations=2, max_tokens=8"),
        ("generations=20, max_tokens=48", "generations=1, max_length=2000, max_tokens=8"),
    ]
    run("docs/from-trl.md", {}, changes=fewer)
    assert Path("short-answers/config.json").exists()


def test_the_page_on_conversations(tiny):
    fewer = [
        ('"smollm2-135m"', '"runs/short/model"'),
        ("population_size=32", "population_size=4"),
        ("generations=20, max_tokens=12", "generations=2, max_tokens=8"),
    ]
    names = run("docs/worlds.md", {}, changes=fewer)
    assert Path("capitals/config.json").exists()
    world = names["Capitals"]()
    assert world.reset(names["rows"][0]) == "What is the capital of France?"
    assert world.step("Paris.").messages == "And of Peru?"
    assert world.step("Cusco").score == 0.5


def test_the_pages_on_reports_and_quantized_models():
    score = run("docs/report.md", {})["reward"]
    assert score(["?", "?"], ["A cat.", "no end"]) == [1.0, 0.0]
    assert run("docs/quantised.md", {})["y"].shape == (8, 5, 8)


def test_the_page_on_serving(tiny, capsys):
    names = run("docs/serve.md", {})
    assert names["answer"].shape[1] > names["ids"]["input_ids"].shape[1]


def test_the_page_on_tasks():
    assert run("docs/tasks.md", {})["score"] == [pytest.approx(1.1)]


def test_the_page_on_rwkv(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rwkv", reason="the package rwkv, which brings the tokenizer, is not installed")
    monkeypatch.chdir(tmp_path)
    saved_pth(tmp_path, name="rwkv7-0.1b.pth")
    run("docs/rwkv7.md", {})
    assert capsys.readouterr().out.split()[-1] == "3"


@pytest.mark.slow
def test_the_page_on_policies(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gymnax")
    monkeypatch.chdir(tmp_path)
    names = run("docs/rl.md", {})
    assert names["trained"].result["end_return"] > 0
