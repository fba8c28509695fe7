"""The programs behind `make docs` and the Docker images: broken links are found, layers hold what extras require."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """Loads a program of scripts/."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_broken_links_are_found(script, tmp_path):
    (tmp_path / "a.html").write_text('<h2 id="one">1</h2><a href="b.html#two">b</a><img src="p.svg">', encoding="utf-8")
    (tmp_path / "b.html").write_text(
        '<a href="a.html#one">a</a><a href="https://example.org/x">x</a>', encoding="utf-8"
    )
    assert script("site").broken(tmp_path) == [
        "a.html: b.html#two: the page has no such section",
        "a.html: p.svg leads to no file of the site",
    ]


def test_pictures_beside_results_are_brought(script, tmp_path):
    site, results = tmp_path / "site", tmp_path / "benchmarks" / "results"
    site.mkdir()
    results.mkdir(parents=True)
    (results / "curve.png").write_bytes(b"png")
    (site / "a.html").write_text('<img src="../benchmarks/results/curve.png">', encoding="utf-8")
    module = script("site")
    assert module.bring_pictures(site, tmp_path) == 1
    assert module.broken(site) == []
    assert (site / "assets/benchmarks/results/curve.png").read_bytes() == b"png"


def test_every_page_is_in_the_navigation():
    """Zensical builds pages that no menu leads to without a word."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = {line.strip().removeprefix("- ").rsplit(": ", 1)[-1] for line in text[text.index("nav:") :].splitlines()}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - named == set()


def test_the_layer_of_libraries_has_what_an_extra_requires(script):
    module = script("requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = module.requirements(project, ["tasks"])
    extras = project["optional-dependencies"]
    inner = [line for line in extras["llm"] if not line.startswith("eggroll-evolve")]
    assert set(found) == {
        *project["dependencies"],
        *extras["torch"],
        *inner,
        "math-verify>=0.9",
        "reasoning-gym>=0.1.25",
    }
    with pytest.raises(SystemExit, match=r"there is no extra 'lm'; there are .*llm"):
        module.requirements(project, ["lm"])


def test_the_steps_of_the_cpu_image(script):
    module = script("docker_steps")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    words = [f"{word} {rest}" for word, rest in module.steps(module.stages(text), "cpu")]
    order = [
        next(index for index, step in enumerate(words) if part in step)
        for part in (
            "python -m venv",
            "torch==",
            "requirements.txt",
            "COPY src",
            "--no-deps .",
            "useradd",
            "ENTRYPOINT",
        )
    ]
    assert order == sorted(order)
    assert words.index("USER 1000") < order[-1]
    assert module.placed("/opt/eggroll/bin:/usr/bin /src", Path("/x")) == "/x/opt/eggroll/bin:/usr/bin /x/src"


def test_the_torch_of_the_images_is_the_tested_one():
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert (ROOT / "Dockerfile").read_text(encoding="utf-8").count(f'"{pinned}') == 2


def test_the_workflow_calls_targets_that_there_are():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {line.split()[1] for line in lines if line.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert called == {"test", "docs", "notebook"}
    assert all(f"\n{target}:" in makefile for target in called)
    targets = {f"--target {stage}" for stage in ("cpu", "cuda")}
    assert all(any(f"AS {target.split()[1]}" in line for line in (ROOT / "Dockerfile").open()) for target in targets)


def test_the_dev_container_builds_the_image_of_the_dockerfile():
    settings = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    build = settings["build"]
    assert (ROOT / ".devcontainer" / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert f" AS {build['target']}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
