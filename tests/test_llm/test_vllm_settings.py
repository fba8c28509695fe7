"""What can be said about a run on vLLM before an engine is started, and the parts that need none."""

import dataclasses
import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from eggroll import EggrollConfig, EggrollTrainer, PerplexityReward
from eggroll.errors import ConfigError, MissingExtraError, ModelError
from eggroll.llm.backends import vllm_parallel
from eggroll.llm.backends.passes import reduce_samples
from eggroll.llm.backends.pool import placement_of
from eggroll.llm.backends.vllm_engine import VllmEngine, _state_bytes, check_vllm
from eggroll.llm.backends.vllm_parallel import across_nodes, check_parallel, worker_engine_args
from eggroll.llm.backends.vllm_worker import MemberAddress, check_equal
from eggroll.llm.models.adapter import save_adapter
from eggroll.llm.models.outline import Outline
from eggroll.llm.rewards.load import as_reward


def outline():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        return Outline.of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=99)))


def score(text):
    return float(len(text))


def test_matrices_are_taken(tiny_tokenizer):
    specs = check_vllm(EggrollConfig(rank=512), outline(), as_reward(score, tiny_tokenizer))
    assert len(specs) == 14
    assert {spec.kind for spec in specs} == {"matrix"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"embeddings": True}, r"model\.embed_tokens\.weight cannot be evolved: adapters of vLLM.*backend='torch'"),
        ({"vectors": True}, r"layernorm\.weight.* and 2 more cannot be evolved"),
        ({"head": True}, r"lm_head\.weight cannot be evolved"),
        ({"target_modules": ["q_proj", "norm"]}, r"model\.norm\.weight cannot be evolved"),
        ({"rank": 513}, r"rank \(=513\) must be at most 512"),
    ],
)
def test_what_an_adapter_cannot_change_is_refused(settings, text, tiny_tokenizer):
    with pytest.raises(ConfigError, match=text):
        check_vllm(EggrollConfig(**settings), outline(), as_reward(score, tiny_tokenizer))


@pytest.mark.parametrize(("dtype", "element"), [("float32", 4), ("bfloat16", 2)])
def test_the_start_weights_are_counted_beside_the_engine(dtype, element, tiny_tokenizer):
    config = EggrollConfig(anchored_weight_decay=0.1)
    specs = check_vllm(config, outline(), as_reward(len, tiny_tokenizer))
    size = sum(spec.size for spec in specs)
    plain = _state_bytes(specs, dataclasses.replace(config, anchored_weight_decay=0.0), dtype)
    assert _state_bytes(specs, config, dtype) == plain + element * size


def test_all_problems_come_at_once(tiny_tokenizer):
    config = EggrollConfig(rank=600, embeddings=True)
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*embed_tokens.*rank.*reward 'perplexity' needs"):
        check_vllm(config, outline(), PerplexityReward(tiny_tokenizer))


@given(st.integers(0, 2**40), st.integers(0, 2**20), st.floats(1e-9, 1e3))
def test_an_address_survives_as_a_path(generation, member, sigma):
    address = MemberAddress(generation, member, sigma)
    assert MemberAddress.parse(address.path()) == address
    assert MemberAddress.parse("/adapters/eggroll") is None


def test_workers_that_disagree_are_an_error():
    assert check_equal([[1, 2], [1, 2]], "x") == [1, 2]
    with pytest.raises(ModelError, match=r"disagree about the weights: \['a', 'b'\]"):
        check_equal(["a", "b", "a"], "the weights")


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.data())
def test_pass_at_k_is_the_mean_of_the_best_over_all_choices(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    wanted = np.mean([max(chosen) for chosen in itertools.combinations(scores, k)])
    np.testing.assert_allclose(reduce_samples(np.array([[scores]]), k), [[wanted]], atol=1e-9)
    np.testing.assert_allclose(reduce_samples(np.array([[scores]])), [[np.mean(scores)]], atol=1e-9)


def test_samples_without_a_score():
    nan = float("nan")
    table = np.array([[[1.0, nan, 3.0], [nan, nan, nan]]])
    np.testing.assert_array_equal(reduce_samples(table), [[2.0, nan]])
    np.testing.assert_array_equal(reduce_samples(table, 3), [[3.0, nan]])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples_per_prompt": 4}, "needs a temperature above 0"),
        ({"samples_per_prompt": 2, "temperature": 1.0, "pass_at": 3}, r"pass_at \(=3\) must be at most"),
        ({"samples_per_prompt": 0}, "whole number of at least 1"),
    ],
)
def test_settings_of_samples(settings, text):
    with pytest.raises(ConfigError, match=text):
        EggrollConfig(**settings)


def test_an_adapter_of_full_rank_is_exact_and_a_smaller_one_as_good_as_can_be(tmp_path):
    torch.manual_seed(0)
    changes = {"model.layers.0.q_proj.weight": torch.randn(6, 8), "model.layers.0.down_proj.weight": torch.randn(3, 5)}
    report = save_adapter(changes, tmp_path / "full", rank=8, base_model="base", metadata={"generations": 2})
    assert report.relative_error < 1e-12
    assert report.full_rank == 6
    tensors = load_file(tmp_path / "full" / "adapter_model.safetensors")
    for name, change in changes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(product, change, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 8, ["down_proj", "q_proj"])
    small = save_adapter(changes, tmp_path / "small", rank=1, base_model="base", metadata={})
    spectra = [torch.linalg.svdvals(change.double()) for change in changes.values()]
    wanted = (sum(float(s[1:].square().sum()) for s in spectra) / sum(float(s.square().sum()) for s in spectra)) ** 0.5
    assert small.relative_error == pytest.approx(wanted)
    with pytest.raises(ConfigError, match="at least 1"):
        save_adapter(changes, tmp_path, rank=0, base_model="", metadata={})
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be saved"):
        save_adapter(changes, tmp_path / "file", rank=1, base_model="", metadata={})


def test_without_vllm_the_pip_line_is_given(monkeypatch, tmp_path, tiny_tokenizer):
    import sys

    import transformers

    from eggroll.vllm_backend import VllmEggrollTrainer

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[vllm\]"):
        VllmEggrollTrainer(str(tmp_path), EggrollConfig(), score, dtype="float32")


@pytest.mark.parametrize(
    ("engine_args", "gpus"),
    [
        ({}, 0),
        ({}, 0.5),
        ({}, 1),
        ({"tensor_parallel_size": 2}, 2),
        ({"tensor_parallel_size": 2, "prefill_context_parallel_size": 3}, 6.0),
        ({"tensor_parallel_size": 2}, 0),  # on the CPU
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}, 2),
        ({"distributed_executor_backend": "ray"}, 1),
    ],
)
def test_an_engine_has_the_gpus_of_its_worker(engine_args, gpus):
    check_parallel(engine_args, gpus)


@pytest.mark.parametrize(
    ("engine_args", "gpus", "text"),
    [
        ({"tensor_parallel_size": 2}, 1,
         r"with tensor_parallel_size \(=2\) computes on 2 GPUs, .* gpus_per_worker \(=1\); use --worker-gpus 2"),
        ({"tensor_parallel_size": 2, "prefill_context_parallel_size": 2}, 2,
         r"tensor_parallel_size \(=2\) x prefill_context_parallel_size \(=2\) computes on 4 GPUs, .*\(=2\); "
         r"""use --worker-gpus 4, or an engine on all of them: --engine-args '\{"tensor_parallel_size": 2\}'$"""),
        ({}, 2, r"an engine with tensor_parallel_size \(=1\) computes on 1 GPU, .* \(=2\); use --worker-gpus 1, or an"),
        ({"tensor_parallel_size": 2}, 0.5, r"computes on 2 GPUs, .* \(=0.5\); use --worker-gpus 2$"),
        ({"tensor_parallel_size": 2}, 2.5, r"computes on 2 GPUs, .* \(=2.5\); use --worker-gpus 2$"),
        ({"tensor_parallel_size": 0, "pipeline_parallel_size": "2"}, 2,
         r"(?s)2 problems.*tensor_parallel_size \(=0\) must be a positive whole.*pipeline_parallel_size \(='2'\) must"),
        ({"pipeline_parallel_size": 2}, 2,
         r"pipeline_parallel_size \(=2\) must be 1: each process of an engine.*use tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}, 0,
         r'distributed_executor_backend="ray" gives each .* a GPU.*\(=0\); use --worker-gpus 2, or leave'),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_fit_its_worker_is_refused(engine_args, gpus, text):
    with pytest.raises(ConfigError, match=text):
        check_parallel(engine_args, gpus)


def test_engines_without_a_gpu_need_the_cpu_build(monkeypatch):
    monkeypatch.setattr(vllm_parallel.metadata, "version", lambda name: "0.32.0")
    check_parallel({}, 0)
    with pytest.raises(ConfigError, match=r"computes on 2 GPUs, .*gpus_per_worker \(=0\); use --worker-gpus 2$"):
        check_parallel({"tensor_parallel_size": 2}, 0)


def test_an_engine_in_a_placement_group_starts_its_own_processes():
    """Left alone, vLLM would choose Ray there, which refuses bundles of more than one GPU."""
    assert worker_engine_args({"max_loras": 4}) == {"max_loras": 4}
    assert worker_engine_args({"tensor_parallel_size": 2})["distributed_executor_backend"] == "mp"
    by_ray = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert worker_engine_args(by_ray) == by_ray
    assert (across_nodes(by_ray), across_nodes({"tensor_parallel_size": 2})) == (True, False)


@pytest.mark.parametrize(
    ("backend", "engine_args", "text"),
    [
        ("vllm", {"tensor_parallel_size": 4}, "use --worker-gpus 4, or an engine on all of them"),
        ("torch", {}, r"a replica in PyTorch computes on one GPU, .*gpus_per_worker \(=2\)"),
    ],
)
def test_a_trainer_refuses_gpus_that_do_not_fit_before_it_looks_for_the_model(backend, engine_args, text):
    with pytest.raises(ConfigError, match=text):
        EggrollTrainer.from_model_id(
            "nowhere", EggrollConfig(), score, workers=2, backend=backend, engine_args=engine_args, gpus_per_worker=2
        )


def test_what_places_workers_needs_workers():
    with pytest.raises(ConfigError, match=r"gpus_per_worker: these place workers; say how many with workers=N"):
        EggrollTrainer.from_model_id("nowhere", EggrollConfig(), score, gpus_per_worker=1)


def test_the_pool_of_engines_over_several_nodes_has_a_bundle_for_each_gpu():
    given = {"gpus_per_worker": 4, "address": "auto"}
    by_ray = {"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}
    assert placement_of("vllm", by_ray, given) == {**given, "across_nodes": True}
    assert placement_of("vllm", {"tensor_parallel_size": 4}, given) == {**given, "across_nodes": False}
    assert placement_of("torch", {}, {"gpus_per_worker": True}) == {"gpus_per_worker": True}  # which the pool refuses


def test_members_at_another_sigma_are_other_adapters(monkeypatch):
    """vLLM keeps adapters by their number: several sigmas are tried with the same noise before a run."""
    module = types.ModuleType("vllm.lora.request")
    module.LoRARequest = lambda name, number, path: (name, number, path)
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    engine = object.__new__(VllmEngine)
    engine.config, engine.asked, engine.tries = EggrollConfig(population_size=4), (-1, 0.0), 0
    asked = [(0, 0.1), (0, 0.2), (0, 0.1), (1, 0.1), (2, 0.09)]
    found = {(*at, member): engine.request(at[0], member, at[1]) for at in asked for member in range(4)}
    again = [engine.request(2, member, 0.09) for member in range(4)]
    assert again == [found[2, 0.09, member] for member in range(4)]
    assert (
        len({number for _, number, _ in found.values()}) == len({name for name, _, _ in found.values()}) == len(found)
    )
    for (generation, sigma, member), (_, _, path) in found.items():
        assert MemberAddress.parse(path) == MemberAddress(generation, member, sigma)
