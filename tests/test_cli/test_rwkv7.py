"""The command line with an original RWKV-7 file: tuning raises the score, resumes and replays bit for bit."""

import pytest
import torch
from rwkv7_models import saved_pth, tiny_rwkv7

from eggroll.run.run_dir import RunDir

SCORE = """
def score(text):
    return sum(byte < 64 for byte in text.encode()) / max(1, len(text.encode()))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with the vocabulary of the World models."""
    model = tiny_rwkv7(vocab_size=65536, width=32, head_dim=16, layers=2)
    return saved_pth(tmp_path_factory.mktemp("rwkv"), model, "bytes.pth")


def test_tune_resume_and_replay(eggroll, path):
    (eggroll.work / "bytes.py").write_text(SCORE)
    settings = ["tune", path, "-r", "bytes.py", "--prompts", "prompts.txt", "--eval-prompts", "held.txt", "-p", "32"]
    settings += ["--rank", "2", "--sigma", "0.1", "--lr", "0.3", "--optimizer", "sgd", "--max-tokens", "8"]
    settings += ["--batch-size", "2", "--dtype", "float32", "--report-to", "none", "--eval-every", "1"]
    done = eggroll(*settings, "-g", "6", "-o", "whole")
    assert done.status == 0, done.err
    lines = [line for line in RunDir.open("whole").metrics() if "heldout_reward" in line]
    assert lines[-1]["heldout_reward"] > lines[0]["heldout_reward"] + 0.05

    assert eggroll(*settings, "-g", "3", "-o", "part").status == 0
    assert eggroll("tune", "--resume", "part", "-g", "6").status == 0
    for name in ("updates.jsonl", "model/model.safetensors", "model/rwkv7.pth"):
        assert (eggroll.work / "whole" / name).read_bytes() == (eggroll.work / "part" / name).read_bytes(), name
    assert eggroll("replay", "whole").status == 0

    before, after = (torch.load(file, weights_only=True) for file in (path, eggroll.work / "whole/model/rwkv7.pth"))
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blocks.1.att.w1" in changed
    assert not changed & {"emb.weight", "head.weight", "blocks.0.att.r_k", "blocks.0.att.x_r"}


def test_info_counts_the_state_and_not_a_cache(eggroll, path):
    done = eggroll("info", path, "-p", "8", "--dtype", "float32")
    assert done.status == 0, done.err
    assert "RWKV7ForCausalLM" in done.out
    assert "bytes" in done.out
