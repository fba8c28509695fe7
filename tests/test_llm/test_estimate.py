"""Counted memory and work against measured memory, real tensors and counted operations."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rwkv7_models import tiny_rwkv7
from torch.utils.flop_counter import FlopCounterMode

from eggroll.core.fitness import shape_fitness
from eggroll.core.records import UpdateRecord
from eggroll.errors import MemoryBudgetError, SelectionError
from eggroll.llm.backends.torch import replica_for
from eggroll.llm.config import EggrollConfig
from eggroll.llm.estimate import machine, memory
from eggroll.llm.estimate.machine import ensure_fits
from eggroll.llm.estimate.memory import Estimate, Workload
from eggroll.llm.estimate.work import work_of
from eggroll.llm.models.outline import Outline
from eggroll.llm.trainer import EggrollTrainer

# Without a prompt, texts are scored. Each run has another moment that needs most.
RUNS = {
    "float32 sgd, long answers": {
        "model": "llama",
        "dtype": "float32",
        "rows": 12,
        "prompt": 4,
        "settings": {"population_size": 8, "rank": 4, "max_tokens": 32, "optimizer": "sgd"},
    },
    "bfloat16 adam, long prompts": {
        "model": "llama",
        "dtype": "bfloat16",
        "rows": 4,
        "prompt": 48,
        "settings": {"population_size": 8, "rank": 4, "max_tokens": 3, "optimizer": "adam"},
    },
    "float32 sgd, rows that end": {
        "model": "llama",
        "dtype": "float32",
        "rows": 4,
        "prompt": 16,
        "ending": True,
        "settings": {"population_size": 8, "rank": 16, "max_tokens": 3, "optimizer": "sgd"},
    },
    "float32 sgd, a recurrent state": {
        "model": "rwkv7",
        "dtype": "float32",
        "rows": 12,
        "prompt": 4,
        "settings": {"population_size": 8, "rank": 1, "max_tokens": 8, "optimizer": "sgd"},
    },
    "float32 adam, texts": {
        "model": "gpt2",
        "dtype": "float32",
        "rows": 4,
        "settings": {"population_size": 4, "rank": 1, "max_length": 32, "optimizer": "adam", "embeddings": True},
    },
    "bfloat16 sgd, texts": {
        "model": "llama",
        "dtype": "bfloat16",
        "rows": 4,
        "settings": {"population_size": 4, "rank": 2, "max_length": 32, "optimizer": "sgd", "vectors": True},
    },
}


@pytest.fixture(scope="module")
def measured():
    """Counted and measured bytes of all runs, from one process."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a part of a process can be measured on Linux only")
    # Freed memory goes back at once, so that resident means in use: by malloc and by the library of matrix products.
    quiet = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
    command = [sys.executable, str(Path(__file__).with_name("memory_script.py")), json.dumps(RUNS)]
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["evaluation", "update"])
@pytest.mark.parametrize("name", RUNS)
def test_memory_is_as_counted(measured, name, part):
    result = measured[name][part]
    assert result["counted"] == pytest.approx(result["measured"], rel=0.15), measured[name]


def of(model, dtype=None, **settings):
    config = EggrollConfig(**{"population_size": 8, "rank": 2, **settings})
    return Estimate.of(Outline.of(model), config, dtype or model.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("rounding", ["master", "nearest", "stochastic"])
def test_fixed_parts_are_the_bytes_of_a_replica(build_model, dtype, optimizer, rounding):
    model = build_model("llama", dtype)
    config = EggrollConfig(population_size=4, rank=2, optimizer=optimizer, rounding=rounding)
    replica = replica_for(model, config)
    assert replica.population.noise.prepare(0, 2, torch.device("cpu"))
    replica.apply(UpdateRecord.make(0, 0.01, 0.01, np.linspace(-0.5, 0.5, 4, dtype=np.float32)))
    state = replica.updater.state_tensors()
    real = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "masters": sum(tensor.nbytes for key, tensor in state.items() if key.startswith("master/")),
        # Adam counts its steps in a scalar per parameter
        "optimizer": sum(x.nbytes for key, x in state.items() if key.startswith("optimizer/") and x.ndim),
        "noise": sum(draws.nbytes for draws in replica.population.noise._cache.values()),
    }
    assert Estimate.of(Outline.of(model), config, dtype).fixed() == real
    anchored = replica_for(model, replace(config, anchored_weight_decay=1.0))
    start = sum(tensor.nbytes for tensor in anchored.updater._anchor._start.values())
    assert Estimate.of(Outline.of(model), anchored.config, dtype).fixed() == {**real, "start weights": start}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recurrent_state_is_counted_and_not_keys_and_values(dtype):
    """Its bytes are those of the model's, and as many after a long text as after a short one."""
    model = tiny_rwkv7().to(dtype)
    cache = model(torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    real = sum(part.nbytes for layer in cache.layers for part in (layer.wkv, layer.att_shift, layer.ffn_shift))
    assert {layer.wkv.dtype for layer in cache.layers} == {torch.float32}
    estimate = of(model, dtype)
    assert estimate.outline.state_bytes(dtype.itemsize) == real
    short, long = (
        {moment.name: moment for moment in estimate.memory(Workload(2, 8, new), members=4).moments}
        for new in (10, 10_000)
    )
    writing = "writing the last token"
    assert short[writing].parts["cache"] == long[writing].parts["cache"] == 8 * real
    assert short[writing].total == long[writing].total
    assert short["reading prompts"].parts["cache"] == 8 * real
    assert estimate.outline.heads == 2  # it has heads, so that keys and values would be counted without the state


def test_estimate_takes_the_parameters_that_the_trainer_evolves(build_model):
    model = build_model("llama")
    for settings in ({}, {"head": True}, {"embeddings": True, "vectors": True}, {"target_modules": ("q_proj",)}):
        config = EggrollConfig(population_size=4, **settings)
        assert list(of(model, **settings).specs) == replica_for(model, config).population.specs
    with pytest.raises(SelectionError, match="target_modules pattern 'q_poj' matches no parameter"):
        of(model, target_modules=("q_poj",))


def test_noise_beyond_the_cache_is_not_kept_and_drawn_twice(tiny_model, monkeypatch):
    workload = Workload(2, 8, 4)
    kept = of(tiny_model)
    monkeypatch.setattr(memory, "CACHE_BYTES", kept.pairs * kept.draw_bytes - 1)
    dropped = of(tiny_model)
    assert dropped.fixed()["noise"] == 0 < kept.pairs * kept.draw_bytes
    monkeypatch.undo()
    assert work_of(kept, workload).normals == 4 * sum(spec.draw_size(2) for spec in kept.specs)
    monkeypatch.setattr(memory, "CACHE_BYTES", 0)
    assert work_of(dropped, workload).normals == 2 * 4 * sum(spec.draw_size(2) for spec in kept.specs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "gemma2"])
def test_multiply_adds_are_those_of_a_forward(build_model, name):
    model, length = build_model(name), 7
    model.set_attn_implementation("eager")  # the counter does not know the fused attention of a CPU
    estimate = of(model)
    ids = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    o = estimate.outline
    counted = work_of(estimate, Workload(1, length)).base // 8
    # In a forward every token attends to all, of which half is masked; and the products of positions are tiny.
    masked = 2 * o.layers * o.heads * o.head_size * (length * (length - 1) // 2)
    assert counted + masked == counter.get_total_flops() // 2


def test_low_rank_multiply_adds(tiny_model):
    estimate = of(tiny_model, embeddings=True, head=True, rank=3)
    specs = {spec.name: spec.matrix_shape for spec in estimate.specs if spec.low_rank}
    _, n = specs.pop("model.embed_tokens.weight")
    head = specs.pop("lm_head.weight")
    body = sum(3 * sum(shape) for shape in specs.values())
    # 5 + 3 tokens are read, all but the last that is written; 4 go through the head
    expected = 8 * (body + 3 * n) + 4 * 3 * sum(head)
    assert work_of(estimate, Workload(2, 5, 4)).low_rank == 8 * 2 * expected


def test_log_bytes_are_those_of_a_record(tiny_model):
    estimate = of(tiny_model, population_size=32)
    scores = np.random.default_rng(0).permutation(32).astype(np.float64)
    line = UpdateRecord.make(0, 0.01, 0.001, shape_fitness(scores)).to_json() + "\n"
    assert work_of(estimate, Workload(1, 4)).log_bytes == len(line)


def test_members_that_fit_are_even_within_the_budget_and_at_least_two(tiny_model):
    estimate, workload = of(tiny_model, population_size=64), Workload(4, 16, 16)
    each = estimate.member_bytes(workload)
    assert estimate.members_that_fit(workload, 7 * each) == 6
    assert estimate.members_that_fit(workload, 1) == 2
    assert estimate.members_that_fit(workload, 1000 * each) == 64


@pytest.mark.parametrize("change", [{"rows": 8}, {"prompt": 64}, {"new": 64}])
def test_more_of_anything_needs_more(tiny_model, change):
    base = {"rows": 4, "prompt": 16, "new": 16}
    estimate = of(tiny_model)
    assert estimate.member_bytes(Workload(**{**base, **change})) > estimate.member_bytes(Workload(**base))


def test_what_cannot_fit_is_refused_with_ways_out(build_model):
    estimate, workload = of(build_model("llama", torch.bfloat16), optimizer="adam"), Workload(2, 8)
    needed = estimate.memory(workload, 2).peak
    ensure_fits(estimate, workload, needed)
    with pytest.raises(MemoryBudgetError) as caught:
        ensure_fits(estimate, workload, needed - 1, where="this machine (cpu)")
    fixed = {key: machine.gigabytes(value) for key, value in estimate.fixed().items()}
    text = str(caught.value)
    assert text.startswith("LlamaForCausalLM with 0.00 billion parameters")
    assert f"needs {machine.gigabytes(needed)} even with 2 members evaluated together" in text
    assert f"weights {fixed['weights']}, masters {fixed['masters']}, optimizer {fixed['optimizer']}" in text
    assert "and this machine (cpu) has " in text
    assert f'optimizer="sgd" (saves {fixed["optimizer"]})' in text
    assert f'rounding="stochastic" (saves {fixed["masters"]})' in text
    assert "target_modules=['q_proj', 'v_proj']" in text


def test_trainer_refuses_before_it_allocates(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(machine, "machine_memory", lambda device: (1000, 1000))
    monkeypatch.setattr("eggroll.llm.backends.build.replica_for", lambda *_: pytest.fail("masters were made"))
    with pytest.raises(MemoryBudgetError, match=r"this machine \(cpu\) has 1.0 kB"):
        EggrollTrainer(tiny_model, EggrollConfig(population_size=4), lambda text: 0.0, tiny_tokenizer)


def test_machine_memory_is_plausible():
    total, free = machine.machine_memory(torch.device("cpu"))
    assert total > 2**28
    assert 0 < free <= total


def test_outline_of_a_mixture_of_experts(build_model):
    outline = Outline.of(build_model("mixtral"))
    assert (outline.experts, outline.experts_per_token) == (2, 1)
    counts = outline.counts()
    assert list(counts) == ["matrix", "embedding", "head", "experts", "vector"]
    assert counts["head"] == (1, 300 * 32)
    assert sum(entries for _, entries in counts.values()) == outline.size
