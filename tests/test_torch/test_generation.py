"""``model.generate()`` under a population: every member's tokens are those of its materialized model."""

import pytest
import torch

from eggroll.torch import Population

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=97,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GROUPED = dict(SMALL, num_key_value_heads=2)

MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(GROUPED, tie_word_embeddings=True)),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(GROUPED, head_dim=8)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(GROUPED, head_dim=8, sliding_window=4)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(GROUPED, num_local_experts=4)),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        dict(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=2, pad_token_id=0),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        dict(
            vocab_size=97,
            d_model=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            forced_eos_token_id=None,
        ),
    ),
}
NEW = 9


def make(name, filled):
    model, config, settings = MODELS[name]
    # float64 and spread weights: no two logits are so close that rounding could choose between them
    return filled(getattr(transformers, model)(getattr(transformers, config)(**settings))).double()


def generated(model, ids, mask=None, **options):
    """Greedy tokens, padded to one length, and the logits they were chosen by."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = dict(max_new_tokens=NEW, do_sample=False, num_beams=1, pad_token_id=0, use_cache=True)
    out = model.generate(ids, attention_mask=mask, **{**settings, **options})
    length = NEW + 1 if model.config.is_encoder_decoder else ids.shape[1] + NEW
    return torch.nn.functional.pad(out, (0, length - out.shape[1]), value=0)


def alone(population, weights_of, member, ids, mask=None, **options):
    model = population.model
    if hasattr(model, "set_experts_implementation") and any("expert" in name for name in population.sites):
        model.set_experts_implementation("eager")
    weights = weights_of(population, member, 5)
    center = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        return generated(model, ids, mask, **options)
    finally:
        for name, parameter in model.named_parameters():
            parameter.copy_(center[name])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", ["pairs", "one_sided_as_long_as_rows"])
def test_greedy_tokens_equal_each_member_alone(name, setting, filled, weights_of):
    options, batch, length = {
        "pairs": (dict(population_size=4, rank=2), 2, 6),
        "one_sided_as_long_as_rows": (dict(population_size=5, rank=1, antithetic=False), 1, 5),
    }[setting]
    model = make(name, filled)
    ids = torch.randint(3, 97, (batch, length))
    population = Population(model, sigma=0.3, **options)
    with population.perturbed(5) as active:
        got = active.split(generated(model, active.expand(ids)))
    for member in range(population.population_size):
        assert torch.equal(got[member], alone(population, weights_of, member, ids)), member
    assert len({tuple(row.flatten().tolist()) for row in got}) > 1, "members must differ for the test to mean anything"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_left_padding(name, filled, weights_of):
    model = make(name, filled)
    ids = torch.randint(3, 97, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    ids[mask == 0] = 0
    population = Population(model, population_size=4, sigma=0.1)
    with population.perturbed(5) as active:
        got = active.split(generated(model, active.expand(ids), active.expand(mask)))
    for member in range(4):
        assert torch.equal(got[member], alone(population, weights_of, member, ids, mask))


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(use_cache=False), dict(cache_implementation="static")])
def test_beams_and_caches(options, filled, weights_of):
    model = make("llama", filled)
    ids = torch.randint(3, 97, (2, 4))
    population = Population(model, population_size=4, sigma=0.1)
    with population.perturbed(5) as active:
        got = active.split(generated(model, active.expand(ids), **options))
    for member in range(4):
        assert torch.equal(got[member], alone(population, weights_of, member, ids, **options))


def test_some_members(filled, weights_of):
    model = make("llama", filled)
    ids = torch.randint(3, 97, (2, 4))
    population = Population(model, population_size=8, sigma=0.1)
    for members in (range(3, 6), range(7, 8)):
        with population.perturbed(5, members) as active:
            got = active.split(generated(model, active.expand(ids)))
        for position, member in enumerate(members):
            assert torch.equal(got[position], alone(population, weights_of, member, ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("keep", [[0, 2, 3, 7], [5], [7, 1], list(range(8))])
def test_rows_that_are_left_keep_their_members(name, keep, filled, weights_of):
    """A decoding loop that drops rows half way, whatever rows are left and in whatever order."""
    model = make(name, filled)
    ids = torch.randint(3, 97, (2, 6))
    population = Population(model, population_size=4, sigma=0.1)
    member_of_row = torch.arange(4).repeat_interleave(2)
    kept = torch.tensor(keep)
    with population.perturbed(5) as active:
        joint = active.expand(ids)
        out = model(joint, use_cache=True)
        tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        cache.batch_select_indices(kept)
        active.select_rows(member_of_row[kept])
        after = model(tokens[kept], past_key_values=cache, use_cache=True).logits
        again = model(torch.cat([joint, tokens], 1)[kept]).logits[:, -1:]
    if name == "mixtral":
        model.set_experts_implementation("eager")
    for position, row in enumerate(keep):
        expected = torch.func.functional_call(
            model,
            weights_of(population, row // 2, 5),
            (torch.cat([joint[row], tokens[row]])[None],),
        ).logits[0, -1]
        for got in (after, again):
            torch.testing.assert_close(got[position, -1], expected, rtol=1e-5, atol=1e-6)


def test_rows_can_be_selected_again(filled, weights_of):
    model = make("llama", filled)
    ids = torch.randint(3, 97, (8, 5))
    population = Population(model, population_size=4, sigma=0.1)
    selections = [[0, 3, 1], [2], [3, 3, 0, 1, 2], [0, 1, 2, 3]]
    found = []
    with population.perturbed(5) as active:
        for member_of_row in selections:
            active.select_rows(torch.tensor(member_of_row))
            found.append(model(ids[: len(member_of_row)]).logits)
    for member_of_row, got in zip(selections, found, strict=True):
        for position, member in enumerate(member_of_row):
            weights = weights_of(population, member, 5)
            expected = torch.func.functional_call(model, weights, (ids[position : position + 1],)).logits[0]
            torch.testing.assert_close(got[position], expected, rtol=1e-5, atol=1e-6)
