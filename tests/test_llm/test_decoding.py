"""What generation takes in the place of transformers' attention and cache: the same tokens, and the model as it was."""

from __future__ import annotations

import weakref

import pytest
import torch

from eggroll.llm.generation.generate import generate
from eggroll.torch import Population
from eggroll.torch.kernels import attention_c

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

from eggroll.llm.generation.attention import NAME, decoding_attention  # noqa: E402
from eggroll.llm.generation.cache import ROOM, GrowingLayer  # noqa: E402

needs_c = pytest.mark.skipif(attention_c.why_not() is not None, reason=f"no C: {attention_c.why_not()}")
COMMON = dict(
    hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=97, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", COMMON),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(COMMON, sliding_window=8)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(COMMON, sliding_window=8)),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=97, n_positions=256, n_embd=64, n_layer=2, n_head=4, eos_token_id=None, tie_word_embeddings=False
        ),
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        dict(vocab_size=97, hidden_size=64, n_layer=2, n_head=4, eos_token_id=None, tie_word_embeddings=False),
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        dict(
            vocab_size=97,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=None,
            tie_word_embeddings=False,
        ),
    ),
    "gptoss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        dict(COMMON, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
    ),
}


def make(name: str) -> torch.nn.Module:
    architecture, config, settings = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, architecture)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():  # so that tokens depend on what stands before them
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.copy_(2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return made


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = torch.randint(3, 97, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)).long()
    return ids * mask, mask


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(name: str) -> None:
    """Greedy tokens in float32, unequal prompts, more of them than a layer has room for at first."""
    model, (ids, mask) = make(name), prompts([3, 11, 20, 20])
    new = ROOM + 9
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, ids.shape[1] :]
    found = generate(model, ids, mask, max_tokens=new, eos_ids=[], pad_id=0)
    assert found == expected.tolist()
    assert len({token for row in found for token in row}) > 3, "a model that always says the same shows nothing"


@needs_c
def test_llama_takes_the_c_call_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, inner = [], attention_c.attend
    monkeypatch.setattr(attention_c, "attend", lambda *given: made.append(inner(*given)) or made[-1])
    model, (ids, mask) = make("llama"), prompts([3, 11])
    generate(model, ids, mask, max_tokens=6, eos_ids=[], pad_id=0)
    assert len(made) == 5 * 2  # the first token comes from the prompts' pass
    assert all(each is not None for each in made)


@needs_c
def test_members_tokens_equal_their_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members together and in C, and each member's weights in the model, by transformers' own attention."""
    model, (ids, mask) = make("llama"), prompts([4, 9])
    population = Population(model, population_size=4, rank=2, sigma=0.05)
    with population.perturbed(0) as active:
        together = generate(model, active.expand(ids), active.expand(mask), max_tokens=12, eos_ids=[], pad_id=0)
    monkeypatch.setattr(attention_c, "attend", lambda *given: None)
    for member in range(4):
        with population.perturbed(0, [member]):
            alone = generate(model, ids, mask, max_tokens=12, eos_ids=[], pad_id=0)
        assert together[2 * member : 2 * member + 2] == alone
    assert together[:2] != together[2:4]


@needs_c
def test_the_model_is_as_it_was() -> None:
    """Also after an error; what does not run ``sdpa``, or cannot be given another attention, is let alone."""
    model = make("llama")

    def fail() -> None:
        with decoding_attention(model) as exchanged:
            assert exchanged
            assert model.config._attn_implementation == NAME
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with decoding_attention(model) as exchanged:
        assert not exchanged
        assert model.config._attn_implementation == "eager"
    for other in (make("bloom"), torch.nn.Linear(3, 3), make("llama").double()):
        with decoding_attention(other) as exchanged:
            assert not exchanged


@needs_c
def test_arguments_that_the_call_does_not_know_go_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    with decoding_attention(model):
        forward = AttentionInterface()[NAME]
    monkeypatch.setattr(attention_c, "attend", lambda *given: pytest.fail("was asked"))
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 6, 16)
    module = model.model.layers[0].self_attn
    module.num_key_value_groups = 1
    bias = torch.zeros(2, 4, 1, 6)
    out, _ = forward(module, q, k, k, None, position_bias=bias, scaling=0.25)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(q, k, k, scale=0.25).transpose(1, 2)
    )


def test_a_growing_layer_holds_what_a_dynamic_one_holds() -> None:
    """Through tokens one by one and many at once, and choices of rows in between."""
    grown, plain = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for step, columns in enumerate([5, 1, 1, ROOM, 1, 3, *[1] * (2 * ROOM)]):
        rows = 4 if step < 7 else 2
        new = [torch.randn(rows, 3, columns, 8, generator=generator) for _ in range(2)]
        for one, other in zip(grown.update(*new), plain.update(*new), strict=True):
            assert torch.equal(one, other)
        assert grown.get_seq_length() == plain.get_seq_length()
        if step == 6:
            keep = torch.tensor([3, 1])
            grown.batch_select_indices(keep)
            plain.batch_select_indices(keep)
    assert grown.keys.data_ptr() != grown.update(*new)[0].data_ptr() or grown.keys.shape[2] == plain.keys.shape[2] + 1


def test_room_is_used() -> None:
    """A token is written beside the others: they are not copied."""
    layer = GrowingLayer()
    places = {layer.update(torch.zeros(2, 1, n, 4), torch.zeros(2, 1, n, 4))[0].data_ptr() for n in [7, *[1] * ROOM]}
    assert len(places) == 1
    assert layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))[0].data_ptr() not in places


def test_cut_rows_give_their_memory_back() -> None:
    layer = GrowingLayer()
    keys, _ = layer.update(torch.zeros(4, 1, 7, 4), torch.zeros(4, 1, 7, 4))
    room = weakref.ref(keys._base)
    del keys
    assert room() is not None
    layer.batch_select_indices(torch.tensor([1]))
    assert room() is None
