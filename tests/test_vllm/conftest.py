"""A tiny Llama on disk that vLLM's CPU kernels take (head size 32), and one engine for a module of tests."""

import importlib.util
import os

import pytest
from tiny_models import write_llama

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_engine*.py"]  # `make test-vllm` has an environment of its own, with vLLM

os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up: half of the start of a small engine


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama of 130,000 parameters with grouped heads, so that q, k and v differ in size."""
    return write_llama(
        tmp_path_factory.mktemp("models") / "tiny", hidden_size=64, intermediate_size=96, num_attention_heads=4,
        head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
