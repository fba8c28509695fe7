"""A tiny model on disk, data beside it, and the command line called in this process."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from eggroll.cli.main import main

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three.", "Who is it?", "Why?"]
TEXTS = [f"the cat sat on mat number {number}" for number in range(12)]


def _llm_conftest():
    path = Path(__file__).parents[1] / "test_llm" / "conftest.py"
    spec = importlib.util.spec_from_file_location("eggroll_test_llm_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A Llama of 26,000 parameters with a byte-level tokenizer and a chat template."""
    made = _llm_conftest()
    tokenizer = made.byte_tokenizer(padding_side="left")
    tokenizer.chat_template = made.CHAT_TEMPLATE
    torch.manual_seed(0)
    sizes = {**made.SIZES, "vocab_size": len(tokenizer)}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch, model_dir):
    """A folder to work in: ``tiny/`` (the model), prompts.txt, held.txt, texts.txt, score.py."""
    (tmp_path / "tiny").symlink_to(model_dir)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "held.txt").write_text("What is blue?\nName a bird.\n")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "score.py").write_text("def score(text):\n    return -float(sum(map(ord, text)) % 97)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TUNE = ["tune", "tiny", "-r", "score.py", "--prompts", "prompts.txt", "-p", "4", "--rank", "1", "--max-tokens", "4"]
TUNE += ["--batch-size", "2", "--dtype", "float32", "--sigma", "0.05", "--lr", "0.02", "--report-to", "none"]


@pytest.fixture
def eggroll(work, capfd):
    """``eggroll("tune", ...)`` gives status, what was printed and what went to standard error."""

    def call(*arguments):
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as left:  # how tyro leaves
            status = left.code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return SimpleNamespace(status=status, out=out, err=err)

    call.work = work
    call.tune = lambda *arguments: call(*TUNE, *arguments)
    call.tune_arguments = TUNE
    return call
