"""Every benchmark runs to its end: ``--quick``, on a tiny model where it takes one. Nothing is measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_llama

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("bench_*.py"))
NEEDS = {"bench_jax": "jax", "bench_quantized": "torchao", "bench_kernels_cuda": "cuda"}
OPTIONS = {"bench_quantized": ["--forms", "bfloat16", "int8"]}
SLOW = {"bench_waiting", "bench_memory", "bench_quantized", "bench_jax"}
"""Each figure is a process of its own, or much is compiled."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny Llama, long enough for countdown's worked examples."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCRIPTS]
)
def test_a_benchmark_runs_to_its_end(script, load, model, monkeypatch, capsys, tmp_path):
    needed = NEEDS.get(script)
    if needed == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if needed not in (None, "cuda") and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    module = load(script)
    source = Path(module.__file__).read_text(encoding="utf-8")
    takes_model = "common.parser(" in source and ("model=False" not in source or '"--model"' in source)
    given = ["--model", str(model)] if takes_model else []
    monkeypatch.setattr(sys, "argv", [module.__file__, "--quick", *given, *OPTIONS.get(script, [])])
    monkeypatch.setattr(sys, "stdin", None)
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
    said = capsys.readouterr().out
    assert said.strip()
    assert "written to" not in said
