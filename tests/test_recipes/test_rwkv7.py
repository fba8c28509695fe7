"""``eggroll recipe rwkv7``: it learns, resumes and replays bit for bit, and takes checkpoints."""

import json

import numpy as np
import pytest
from rwkv7_models import saved_pth, tiny_rwkv7

import eggroll.jax as hs
from eggroll.recipes import rwkv7
from eggroll.run.run_dir import RunDir

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "decay_low_rank_dim": 4, "a_low_rank_dim": 4,
        "v_low_rank_dim": 4, "gate_low_rank_dim": 4}  # fmt: skip
SMALL = ["rwkv7", "-p", "64", "--members-per-forward", "32", "--prompts", "2", "--max-tokens", "12", "--report-to",
         "none", "--no-vectors", "--sigma", "0.5", "--seed", "3"]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """A smaller model, and half of the bytes, so that zeros are more frequent."""
    monkeypatch.setattr(rwkv7, "RANDOM", TINY)
    monkeypatch.setattr(rwkv7.Bytes, "vocab_size", 64)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target-modules", "att"], "target_modules and exclude are not for this recipe"),
        (["-p", "33", "--sampling", "one_sided"], "population_size (=33) must be even"),
        (["--prompts", "0", "--temperature", "-1"], "2 problems"),
        (["--model", "nowhere.pth"], "--model nowhere.pth does not exist; give an RWKV-7 .pth file"),
        (["--task", "zeroes"], "did you mean zeros"),
        (["--device", "cuda:7"], "--device cuda:7: "),
    ],
)
def test_mistakes(arguments, text, recipe):
    done = recipe("rwkv7", *arguments)
    assert done.status in (1, 2)
    assert text in " ".join(done.err.split())


def test_texts_of_bytes():
    tokens = rwkv7.Bytes().encode(["Write 12 zeros.", "é"])
    assert tokens == [list(b"Write 12 zeros."), [ord("?")]]
    assert rwkv7.Bytes().decode(tokens[0]) == "Write 12 zeros."


@pytest.mark.slow
def test_a_run_is_resumed_and_replayed_bit_for_bit(recipe, tmp_path, tiny):
    done = recipe(*SMALL, "-g", "4", "-o", "whole")
    assert (done.status, done.err) == (0, "")
    assert "model    random weights, a byte a token" in done.out
    assert "parameters evolved, on cpu" in done.out
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert 0 <= result["test_score_before"] <= 1
    assert result["test_problems"] == 64
    samples = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()
    assert {"member", "prompt", "completion", "score"} <= json.loads(samples[0]).keys()
    assert recipe(*SMALL, "-g", "2", "-o", "part").status == 0
    more = recipe("rwkv7", "--resume", "part", "-g", "4")
    assert (more.status, more.err) == (0, "")
    whole, part = (RunDir.open(tmp_path / name) for name in ("whole", "part"))
    assert whole.updates() == part.updates()
    one, other = (run.latest_checkpoint().load() for run in (whole, part))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    replayed = recipe(tmp_path / "part", command="replay")
    assert "generation 4 of 4, equal to its checkpoint, bit for bit" in replayed.out
    params = hs.models.rwkv7.load(tmp_path / "part" / "replay-4" / "model").params
    np.testing.assert_array_equal(params["blocks"]["att"]["w1"], one["0/blocks/att/w1"])
    first = rwkv7.worker(rwkv7.RWKV7Options(seed=3, device="cpu"))
    np.testing.assert_array_equal(params["blocks"]["att"]["x_r"], first.params["blocks"]["att"]["x_r"])
    assert not np.array_equal(params["blocks"]["att"]["w1"], first.params["blocks"]["att"]["w1"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rates_mean_what_they_mean_elsewhere(optimizer, tiny):
    """A step is eggroll's: ``params + lr * es_gradient`` for SGD, with the noise that the members had."""
    from eggroll.core.records import UpdateRecord

    options = rwkv7.RWKV7Options(
        population_size=4, optimizer=optimizer, sigma=0.2, lr=0.03, device="cpu", weight_decay=0.0
    )
    worker = rwkv7.worker(options)
    before, weights = worker.params["blocks"]["ln1"]["bias"], np.array([1.0, -1.0, 0.5, 0.25], np.float32)
    frozen, dynamic = worker.search.noiser({})
    gradient = np.zeros(before.shape)
    for member, weight in enumerate(weights):
        for block, key in enumerate(worker.keys["blocks"]["ln1"]["bias"]):
            noisy = hs.noiser.eggroll.EggRoll.get_noisy_standard(
                frozen, {**dynamic, "sigma": 1.0}, np.zeros_like(before[block]), key, (1, member)
            )
            gradient[block] += weight * np.asarray(noisy) / 4
    norm = worker.apply(UpdateRecord.make(1, 0.2, 0.03, weights))
    expected = 0.03 * gradient if optimizer == "sgd" else 0.03 * np.sign(gradient)
    np.testing.assert_allclose(worker.params["blocks"]["ln1"]["bias"] - before, expected, rtol=1e-3, atol=1e-6)
    assert norm > 0


@pytest.mark.slow
def test_it_learns_to_write_zeros(recipe, tmp_path, tiny):
    """A quarter of the default's evaluations; its own result is in docs/recipes.md."""
    assert recipe("rwkv7", "-p", "128", "-g", "30", "--report-to", "none", "-o", "out").status == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["test_score_before"] < 0.05
    assert result["test_score_after"] > 0.1


@pytest.mark.slow
def test_a_checkpoint_on_countdown(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(rwkv7, "TESTED", 8)
    path = saved_pth(tmp_path, tiny_rwkv7(vocab_size=65536, width=16, head_dim=8, layers=2), "world.pth")
    arguments = ["--model", path, "--task", "countdown", "-p", "8", "-g", "1", "--prompts", "8", "--max-tokens", "2"]
    done = recipe("rwkv7", *arguments, "--report-to", "none", "-o", "out")
    assert (done.status, done.err) == (0, "")
    assert "world.pth" in done.out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["task"] == "countdown"
