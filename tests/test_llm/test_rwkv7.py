"""RWKV-7 against the original package, another implementation, itself token by token, and as a population."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rwkv7_models import saved_pth, tiny_rwkv7

from eggroll.llm.generation.generate import generate
from eggroll.llm.rwkv7 import wkv
from eggroll.torch import Population

SETTINGS = {"population_size": 6, "sigma": 0.02, "rank": 2}


def _ids(*shape, seed=0):
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(seed))


def _padded(rows):
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return ids, mask


def _recurrence(length, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    r, k, v, w, kk, a = (torch.randn(2, length, 3, 16, dtype=dtype) for _ in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    return r, -0.6065 * torch.sigmoid(4 * w), k, v, -kk, kk * torch.sigmoid(a), torch.randn(2, 3, 16, 16, dtype=dtype)


SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The original package's logits of the tiny models: seed to logits at once, and token by token."""
    folder = tmp_path_factory.mktemp("original")
    for seed in SEEDS:
        saved_pth(folder, tiny_rwkv7(seed), f"{seed}.pth")
        torch.save(_ids(37, seed=seed), folder / f"{seed}.ids")
    program = Path(__file__).parents[1] / "rwkv7_reference.py"
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {seed: torch.load(folder / f"{seed}.logits", weights_only=True) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_are_the_original_packages(original, seed):
    model, ids = tiny_rwkv7(seed), _ids(37, seed=seed)[None]
    torch.testing.assert_close(model(ids).logits[0], original[seed]["at once"], atol=1e-4, rtol=0)
    cache = None
    for token, expected in zip(ids[0], original[seed]["steps"], strict=True):
        out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[0, -1], expected, atol=1e-4, rtol=0)


def test_logits_are_those_of_the_hugging_face_implementation(tmp_path):
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM
    from safetensors.torch import load_file

    model, ids = tiny_rwkv7(head_dim=64), _ids(2, 19)
    model.save_pretrained(tmp_path)
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "transformers_version")}
    other = RWKV7ForCausalLM(RWKV7Config(**settings)).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
@pytest.mark.parametrize("form", [wkv.wkv7, wkv.wkv7_blocks, wkv.wkv7_steps])
def test_the_recurrence_in_every_form(form, length):
    parts = _recurrence(length)
    y, state = form(*parts)
    expected_y, expected_state = wkv.wkv7_steps(*(part.double() for part in parts))
    assert y.dtype == state.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected_y, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, atol=2e-4, rtol=1e-5)


def test_the_recurrence_leaves_the_state_it_was_given(monkeypatch):
    parts = _recurrence(5)
    before = parts[-1].clone()
    compiled = wkv.wkv7(*parts)
    assert torch.equal(parts[-1], before)
    monkeypatch.setattr(wkv, "_library", lambda: "no compiler")
    for with_c, without in zip(compiled, wkv.wkv7(*parts), strict=True):
        torch.testing.assert_close(with_c, without, atol=1e-4, rtol=1e-5)


def test_the_blocks_have_the_gradient_of_the_steps():
    parts = [part.requires_grad_() for part in _recurrence(20, torch.float64)]
    gradients = [
        torch.autograd.grad(sum(x.sin().sum() for x in form(*parts)), parts) for form in (wkv.wkv7, wkv.wkv7_steps)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_and_a_cache_change_nothing():
    model = tiny_rwkv7()
    rows = [_ids(n, seed=n) for n in (3, 21, 1)]
    ids, mask = _padded(rows)
    together = model(ids, attention_mask=mask, use_cache=True)
    for index, row in enumerate(rows):
        alone = model(row[None], use_cache=True)
        torch.testing.assert_close(together.logits[index, -len(row) :], alone.logits[0], atol=1e-5, rtol=0)
        for one, other in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
            torch.testing.assert_close(one.wkv[index], other.wkv[0], atol=1e-5, rtol=0)
    # a second part with padding of its own goes on from the state
    more = [_ids(n, seed=10 + n) for n in (4, 1, 2)]
    ids, mask = _padded(more)
    out = model(ids, attention_mask=mask, past_key_values=together.past_key_values)
    for index, (row, then) in enumerate(zip(rows, more, strict=True)):
        alone = model(torch.cat([row, then])[None])
        torch.testing.assert_close(out.logits[index, -1], alone.logits[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kinds", [("matrix",), ("matrix", "vector", "embedding")])
def test_every_member_is_its_materialized_twin(kinds):
    model = tiny_rwkv7()
    population = Population(model, kinds=kinds, **SETTINGS)
    ids, mask = _padded([_ids(n, seed=n) for n in (4, 11)])
    together = population.forward(ids.repeat(6, 1), attention_mask=mask.repeat(6, 1), generation=1).logits
    assert population.mode == "rows"
    center = model(ids, attention_mask=mask).logits
    for member, logits in enumerate(together.unflatten(0, (6, 2))):
        with population.member(1, member, materialize=True) as twin:
            expected = twin(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert (expected - center).abs().max() > 0.05


def test_matrices_are_perturbed_and_vectors_are_not_by_default():
    model = tiny_rwkv7()
    names = {spec.name for spec in Population(model, kinds=("matrix", "conv", "experts"), exclude=("head",)).specs}
    per_block = {"receptance.weight", "key.weight", "value.weight", "output.weight", "w1", "w2", "a1", "a2", "g1", "g2"}
    expected = {f"blocks.{n}.att.{name}" for n in range(3) for name in per_block}
    expected |= {f"blocks.{n}.att.{name}" for n in (1, 2) for name in ("v1", "v2")}
    expected |= {f"blocks.{n}.ffn.{name}.weight" for n in range(3) for name in ("key", "value")}
    assert names == expected


@pytest.mark.parametrize("shared", [0, 30])
def test_generated_tokens_are_each_rows_own(shared):
    """With and without a beginning that all prompts share, and with rows that end early."""
    model, ends = tiny_rwkv7(), list(range(80))
    rows = [torch.cat([_ids(shared, seed=99), _ids(n, seed=n)]) for n in (5, 12, 1)]
    ids, mask = _padded(rows)
    population, dropped = Population(model, kinds=("matrix",), **SETTINGS), []
    member_of_row = torch.arange(18) // 3
    with population.perturbed(0) as active:

        def select(kept):
            nonlocal member_of_row
            member_of_row = member_of_row[kept]
            dropped.append(len(kept))
            active.select_rows(member_of_row)

        found = generate(
            model, ids.repeat(6, 1), mask.repeat(6, 1), max_tokens=10, eos_ids=ends, pad_id=0, select_rows=select,
            prompts=3,
        )  # fmt: skip
    assert dropped
    for member in range(6):
        with population.member(0, member, materialize=True) as twin:
            for index, row in enumerate(rows):
                alone = generate(
                    twin, row[None], torch.ones(1, len(row), dtype=torch.long), max_tokens=10, eos_ids=ends, pad_id=0
                )
                assert found[member * 3 + index] == alone[0]
    assert len({tuple(tokens) for tokens in found}) > 3


def test_transformers_own_generation_works():
    model = tiny_rwkv7()
    ids, mask = _padded([_ids(7), _ids(2, seed=1)])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    own = generate(model, ids, mask, max_tokens=5, eos_ids=[], pad_id=0)
    assert out[:, -5:].tolist() == own
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=2, do_sample=False)
    assert beams.shape[0] == 2


def test_bfloat16_keeps_the_state_in_float32():
    model, ids = tiny_rwkv7(), _ids(1, 24)
    exact = model(ids).logits
    half = model.bfloat16()(ids, use_cache=True)
    assert half.past_key_values.layers[0].wkv.dtype == torch.float32
    assert (half.logits.float() - exact).abs().max() < 0.1


def test_the_unmodified_hugging_face_model_is_right_in_some_mode():
    """Its linear layers regroup rows in fixed blocks, so that rows cannot be followed: another mode is taken."""
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

    torch.manual_seed(0)
    config = RWKV7Config(vocab_size=40, hidden_size=64, num_hidden_layers=2, head_dim=32, num_heads=2,
                         decay_low_rank_dim=8, a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8)  # fmt: skip
    model = RWKV7ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    population, ids = Population(model, population_size=4, sigma=0.05), torch.randint(1, 40, (4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = population.forward(ids, generation=1, use_cache=False).logits
        for member in range(4):
            with population.member(1, member, materialize=True) as twin:
                alone = twin(ids[member : member + 1], use_cache=False).logits
            torch.testing.assert_close(together[member : member + 1], alone, atol=1e-5, rtol=1e-5)
    assert population.mode in ("rows", "vmap", "loop")
