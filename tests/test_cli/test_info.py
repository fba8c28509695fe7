"""What ``eggroll info`` prints, against the parameters of models that it never loads."""

import pytest
import torch
import transformers

from eggroll.cli.main import main
from eggroll.lifecycle.memory import gigabytes

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
# by hand: q and o 32 x 32, k and v 16 x 32, three matrices 48 x 32; two norms a layer and one at the end
MATRICES = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
VECTORS = (2 * 2 + 1) * 32


@pytest.fixture
def model_directory(tmp_path):
    """Makes a directory that holds nothing but a configuration."""

    def make(**changes):
        path = tmp_path / "tiny-llama"
        transformers.LlamaConfig(**{**SIZES, **changes}, architectures=["LlamaForCausalLM"]).save_pretrained(path)
        return path

    return make


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs ``eggroll info`` on a wide terminal; gives the status, the lines without double spaces, and stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def command(*arguments):
        status = main(["info", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, [" ".join(line.split()) for line in printed.out.splitlines()], printed.err

    return command


def test_counts_of_a_tiny_llama(run, model_directory):
    status, lines, _ = run(model_directory(), "-p", 8, "--rank", 2, "--dtype", "float32")
    assert status == 0
    total = MATRICES + VECTORS + 2 * 300 * 32
    assert "tiny-llama LlamaForCausalLM, 34.7 k parameters, float32" in lines
    for line in (
        "layers 2",
        "width 32",
        "inner width 48 (gated)",
        "heads 4 of size 8, 2 for keys and values",
        "vocabulary 300",
        "output head its own",
        f"matrix 14 {MATRICES:,} {MATRICES / total:.1%} {MATRICES:,}",
        f"embedding 1 {300 * 32:,} {300 * 32 / total:.1%} 0",
        f"head 1 {300 * 32:,} {300 * 32 / total:.1%} 0",
        f"vector 5 {VECTORS} {VECTORS / total:.1%} 0",
        f"total 21 {total:,} 100.0% {MATRICES:,}",
    ):
        assert line in lines


def test_a_tied_head_is_counted_once(run, model_directory):
    _, lines, _ = run(model_directory(tie_word_embeddings=True), "--embeddings", "--vectors", "--dtype", "float32")
    assert "output head the embedding (tied)" in lines
    total = MATRICES + VECTORS + 300 * 32
    assert f"total 20 {total:,} 100.0% {total:,}" in lines
    assert not any(line.startswith("head ") for line in lines)


def test_memory_and_work(run, model_directory):
    arguments = ("-p", 8, "--rank", 2, "--optimizer", "adam", "--dtype", "bfloat16", "--batch-size", 3)
    _, lines, _ = run(model_directory(), *arguments, "--prompt-tokens", 5, "--max-tokens", 7, "--max-length", 9)
    draws = 2 * 2 * (32 + 32 + 16 + 32 + 16 + 32 + 32 + 32 + 3 * (48 + 32))
    weights = gigabytes(2 * (MATRICES + VECTORS + 2 * 300 * 32))
    assert "memory, 8 members, rank 2, adam" in lines
    assert f"weights {weights} {weights}" in lines
    assert f"float32 masters {gigabytes(4 * MATRICES)} {gigabytes(4 * MATRICES)}" in lines
    assert f"optimizer state {gigabytes(8 * MATRICES)} {gigabytes(8 * MATRICES)}" in lines
    assert f"kept noise {gigabytes(4 * 4 * draws)} {gigabytes(4 * 4 * draws)}" in lines
    assert "members evaluated together 8 8" in lines
    assert "tokens of a member 3 x (5 + 7) 3 x 9" in lines
    assert f"tokens {8 * 3 * 12} {8 * 3 * 9}" in lines
    assert f"normals drawn {4 * draws / 1000:.1f} k {4 * draws / 1000:.1f} k" in lines
    assert any(line.startswith("written answers: fits: ") for line in lines)
    assert any(line.startswith("perplexity: fits: ") for line in lines)


def test_settings_change_what_is_needed(run, model_directory):
    path = model_directory()
    _, lines, _ = run(path, "--optimizer", "sgd", "--dtype", "float32", "--target-modules", "q_proj", "v_proj")
    assert "float32 masters - -" in lines
    assert "optimizer state - -" in lines
    evolved = 2 * (32 * 32 + 16 * 32)
    assert any(line.startswith("total ") and line.endswith(f" {evolved:,}") for line in lines)


def test_dtype_is_chosen_and_explained(run, model_directory):
    _, lines, _ = run(model_directory())
    assert any(line.startswith("dtype ") and "the speed of float32 here" in line for line in lines)


def test_what_does_not_fit_is_said_with_ways_out(run, model_directory, monkeypatch):
    monkeypatch.setattr("eggroll.llm.estimate.machine.machine_memory", lambda device: (100_000, 50_000))
    status, lines, _ = run(model_directory(), "--dtype", "float32", "--optimizer", "adam")
    assert status == 0
    assert any(
        line.startswith("perplexity: does not fit: ") and line.endswith("50.0 kB of 100.0 kB free on cpu")
        for line in lines
    )
    assert any(line.startswith('ways out: optimizer="sgd" (saves ') for line in lines)


def test_weights_are_never_made(run, model_directory):
    # 100 layers of width 32768 would take terabytes
    path = model_directory(hidden_size=32768, intermediate_size=131072, num_hidden_layers=100, vocab_size=200_000)
    status, lines, _ = run(path, "--dtype", "bfloat16", "--device", "cpu")
    assert status == 0
    assert any(line.startswith("written answers: does not fit: ") for line in lines)


def test_unknown_model(run):
    status, _, error = run("smollm2-135n")
    assert status == 1
    assert error.startswith("error: there is no model 'smollm2-135n'; did you mean 'smollm2-135m'?")
    status, _, error = run("smollm2")
    assert status == 1
    assert error.startswith("error: model 'smollm2' cannot be loaded. Tried: a directory or file of that name")
    assert "an alias is near: 'smollm2-135m'" in error


def test_directory_without_a_model(run, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    status, _, error = run(tmp_path)
    assert status == 1
    assert "holds no model: a model's directory has a config.json. In it there is: notes.txt" in " ".join(error.split())


def test_pattern_that_matches_nothing(run, model_directory):
    status, _, error = run(model_directory(), "--target-modules", "q_poj")
    assert status == 1
    assert "target_modules pattern 'q_poj' matches no parameter. Near matches: q_proj" in error


def test_settings_that_cannot_work(run, model_directory):
    status, _, error = run(model_directory(), "-p", 7)
    assert status == 1
    assert "population_size (=7) must be even" in error


def test_outline_and_loaded_model_agree(model_directory):
    from eggroll.llm.models.outline import Outline, look_up

    path = model_directory(tie_word_embeddings=True)
    found = look_up(str(path), dtype="bf16", device="cpu")
    assert found.outline == Outline.of(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True)))  # fmt: skip
    assert (found.name, found.dtype, found.device) == ("tiny-llama", torch.bfloat16, torch.device("cpu"))
