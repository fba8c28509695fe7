"""A tiny Llama on disk that vLLM's CPU kernels take (head size 32), and one engine for a module of tests."""

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_engine*.py"]  # `make test-vllm` has an environment of its own, with vLLM

os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up: half of the start of a small engine


def _llm_conftest():
    path = Path(__file__).parents[1] / "test_llm" / "conftest.py"
    spec = importlib.util.spec_from_file_location("eggroll_test_llm_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_model(folder):
    """A Llama of 130,000 parameters with grouped heads, so that q, k and v differ in size."""
    import torch
    import transformers

    made = _llm_conftest()
    tokenizer = made.byte_tokenizer(padding_side="left")
    tokenizer.chat_template = made.CHAT_TEMPLATE
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=False,
        attention_bias=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")
