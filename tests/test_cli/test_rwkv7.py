"""The command line with RWKV-7: tuning raises the score, resumes and replays bit for bit, from both kinds of files."""

import pytest
import torch
from rwkv7_models import saved_pth, tiny_rwkv7
from tiny_models import byte_tokenizer

from eggroll.run.run_dir import RunDir

SCORE = """
def score(text):
    return sum(letter in "etaoinshr" for letter in text) / 8
"""
SETTINGS = [
    *("-r", "letters.py", "--prompts", "prompts.txt", "--eval-prompts", "held.txt", "--batch-size", "4", "--head"),
    *("-p", "64", "--rank", "2", "--sigma", "0.1", "--lr", "2.0", "--optimizer", "sgd", "--max-tokens", "8"),
    *("--dtype", "float32", "--report-to", "none", "--eval-every", "8"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face directory whose tokens are bytes."""
    path = tmp_path_factory.mktemp("rwkv") / "bytes"
    tiny_rwkv7(vocab_size=262, width=32, head_dim=16, layers=2).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_tune_resume_and_replay(eggroll, directory):
    (eggroll.work / "letters.py").write_text(SCORE)
    done = eggroll("tune", directory, *SETTINGS, "-g", "8", "-o", "whole")
    assert done.status == 0, done.err
    heldout = [line["heldout_reward"] for line in RunDir.open("whole").metrics() if "heldout_reward" in line]
    assert heldout[-1] > heldout[0] + 0.3

    assert eggroll("tune", directory, *SETTINGS, "-g", "4", "-o", "part").status == 0
    assert eggroll("tune", "--resume", "part", "-g", "8").status == 0
    for name in ("updates.jsonl", "model/model.safetensors", "model/rwkv7.pth"):
        assert (eggroll.work / "whole" / name).read_bytes() == (eggroll.work / "part" / name).read_bytes(), name
    assert eggroll("replay", "whole").status == 0

    files = (directory / "rwkv7.pth", eggroll.work / "whole/model/rwkv7.pth")
    before, after = (torch.load(file, weights_only=True) for file in files)
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"blocks.1.att.w1", "head.weight"} <= changed
    assert not changed & {"emb.weight", "blocks.0.att.r_k", "blocks.0.att.x_r"}


def test_an_original_file_with_the_world_tokenizer(eggroll):
    path = saved_pth(eggroll.work, tiny_rwkv7(vocab_size=65536, width=32, head_dim=16, layers=2), "world.pth")
    done = eggroll("info", path, "-p", "8", "--dtype", "float32")
    assert done.status == 0, done.err
    assert "world" in done.out
    assert "RWKV7ForCausalLM" in done.out
    # 2 blocks of 32 x (16 entries of state + 2 last tokens), 4 bytes each
    assert "recurrent state 4.6 kB for each row, in float32, at any length" in " ".join(done.out.split())
    run = eggroll("tune", path, "-r", "score.py", "--prompts", "prompts.txt", "-g", "1", "-p", "4", "--max-tokens", "4",
                  "--dtype", "float32", "--report-to", "none", "-o", "run")  # fmt: skip
    assert run.status == 0, run.err
    assert (eggroll.work / "run/model/rwkv_vocab_v20230424.txt").is_file()
    assert eggroll("tune", "--resume", "run", "-g", "2").status == 0
