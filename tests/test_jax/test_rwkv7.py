"""RWKV-7 in JAX: equal to the PyTorch model, through the noisers, and from every layout of checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rwkv7_models import saved_pth, tiny_rwkv7
from safetensors.torch import save_file

import eggroll.jax as hs
import eggroll.llm
from eggroll.core.rwkv7 import to_layout
from eggroll.errors import ConfigError, ModelError
from eggroll.jax.models._rwkv7_parts import recurrence
from eggroll.llm.rwkv7.wkv import wkv7_steps

c, RWKV7 = hs.models.common, hs.models.rwkv7.RWKV7
NOOP, EGGROLL = hs.noiser.base_noiser.Noiser, hs.noiser.eggroll.EggRoll
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 16, "decay_low_rank_dim": 6,
    "a_low_rank_dim": 5, "v_low_rank_dim": 4, "gate_low_rank_dim": 7,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 40, (2, 9))


@pytest.fixture(scope="module")
def small():
    """A model in which no parameter is the identity of what it is used for."""
    made = RWKV7.rand_init(jax.random.key(1), **SMALL)
    leaves, structure = jax.tree.flatten(made.params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return made._replace(params=structure.unflatten(params))


def runner(init, noiser=NOOP, sigma=0.1, **settings):
    """``run(params, iterinfo, tokens, state, mask)``, compiled once for each shape."""
    keys = c.simple_es_tree_key(init.params, jax.random.key(3), init.scan_map)
    frozen, dynamic = noiser.init_noiser(init.params, sigma, 0.1, **settings)

    def run(params, iterinfo, *args):
        return RWKV7.forward(noiser, frozen, dynamic, init.frozen_params, params, keys, iterinfo, *args)

    return jax.jit(run)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_are_the_pytorch_models(seed, tmp_path):
    model = tiny_rwkv7(seed)
    ids = torch.randint(1, 300, (2, 37), generator=torch.Generator().manual_seed(seed))
    expected, tokens = model(ids).logits.numpy(), jnp.asarray(ids.numpy())
    init = hs.models.rwkv7.load(saved_pth(tmp_path, model))
    run = runner(init)
    logits, after = run(init.params, None, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    state = RWKV7.empty_state(init.params, init.frozen_params, 2)
    for place in range(37):
        logits, state = run(init.params, None, tokens[:, place : place + 1], state)
        np.testing.assert_allclose(logits[:, 0], expected[:, place], atol=1e-5, rtol=0)
    for name, value in state.items():
        np.testing.assert_allclose(value, after[name], atol=1e-5, rtol=0)


def test_bfloat16_is_as_near_as_pytorchs(tmp_path):
    """Both round at the same places, to half of the last of 8 bits; the paths to it differ in single roundings."""
    model, ids = tiny_rwkv7(), torch.arange(1, 30)[None]
    init = hs.models.rwkv7.load(saved_pth(tmp_path, model.bfloat16()), dtype="bfloat16")
    logits, state = runner(init)(init.params, None, jnp.asarray(ids.numpy()))
    assert (logits.dtype, state["att_shift"].dtype, state["wkv"].dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = model.float()(ids).logits
    plain = (model.bfloat16()(ids).logits.float() - exact).abs().max()
    assert np.abs(np.asarray(logits, np.float32) - exact.numpy()).max() <= 2 * plain


def test_padding_is_stepped_over(small):
    run, rows = runner(small), [IDS[0, :3], IDS[1]]
    ids, mask = np.zeros((2, 11), int), np.zeros((2, 11), bool)
    ids[0, 8:], ids[1, 2:] = rows
    mask[0, 8:], mask[1, 2:] = True, True
    together, state = run(small.params, None, ids, None, mask)
    for index, row in enumerate(rows):
        alone, own = run(small.params, None, row)
        np.testing.assert_allclose(together[index, -len(row) :], alone, atol=1e-5)
        for name, value in own.items():
            np.testing.assert_allclose(state[name][:, index], value, atol=1e-5)
    more, _ = run(small.params, None, ids, state, mask)
    np.testing.assert_allclose(more[0, -1], run(small.params, None, np.concatenate([rows[0]] * 2))[0][-1], atol=1e-5)


def test_the_recurrence_is_the_one_of_pytorch():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(2, 7, 3, 8)).astype(np.float32) for _ in range(6)]
    parts[1] = -0.6 / (1 + np.exp(parts[1]))
    state = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    expected = wkv7_steps(*(torch.tensor(part).double() for part in (*parts, state)))
    for got, want in zip(recurrence(*parts, state), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-5)


def test_classes_of_parameters():
    init = RWKV7.rand_init(jax.random.key(0), **SMALL)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): v for path, v in jax.tree.leaves_with_path(init.es_map)
    }
    excluded = {"emb.weight", "head.weight"}
    matrices = {f"blocks.att.{name}{n}" for name in "wavg" for n in (1, 2)} | {
        *(f"blocks.att.{name}.weight" for name in ("receptance", "key", "value", "output")),
        "blocks.ffn.key.weight", "blocks.ffn.value.weight",
    }  # fmt: skip
    assert {name for name, kind in flat.items() if kind == c.EXCLUDED} == excluded
    assert {name for name, kind in flat.items() if kind == c.MM_PARAM} == matrices
    assert {name for name in flat if flat[name] == c.PARAM} == flat.keys() - excluded - matrices
    assert {"blocks.att.x_r", "blocks.att.r_k", "blocks.att.w0", "blocks.ln1.bias", "ln0.weight"} <= flat.keys()
    assert init.params["blocks"]["att"]["v1"].shape == (2, 32, 4)
    assert init.params["blocks"]["att"]["w1"].shape == (3, 32, 6)


@pytest.mark.parametrize("frozen_vectors", [False, True])
def test_every_member_is_its_materialized_twin(small, frozen_vectors):
    sigma, rank = 0.1, 2
    noisy = runner(small, EGGROLL, sigma, rank=rank, freeze_nonlora=frozen_vectors, noise_reuse=1)
    plain = runner(small)
    keys = c.simple_es_tree_key(small.params, jax.random.key(3), small.scan_map)
    settings, dynamic = EGGROLL.init_noiser(
        small.params, sigma, 0.1, rank=rank, freeze_nonlora=frozen_vectors, noise_reuse=1
    )
    center = plain(small.params, None, IDS)[0]
    np.testing.assert_array_equal(noisy(small.params, None, IDS)[0], center)
    for member in (0, 1, 6):
        iterinfo = (2, member)

        def twin(leaf, key, scan, kind, iterinfo=iterinfo):
            if kind == c.EXCLUDED:
                return leaf
            make = (lambda leaf, key: leaf + _product(settings, sigma, rank, iterinfo, leaf, key)) if (
                kind == c.MM_PARAM
            ) else (lambda leaf, key: EGGROLL.get_noisy_standard(settings, dynamic, leaf, key, iterinfo))  # fmt: skip
            return jax.vmap(make)(leaf, key) if scan else make(leaf, key)

        member_params = jax.tree.map(twin, small.params, keys, small.scan_map, small.es_map)
        logits = noisy(small.params, iterinfo, IDS)[0]
        np.testing.assert_allclose(logits, plain(member_params, None, IDS)[0], atol=2e-5)
        assert np.abs(logits - center).max() > 0.02
        np.testing.assert_array_equal(member_params["emb"]["weight"], small.params["emb"]["weight"])


def _product(settings, sigma, rank, iterinfo, leaf, key):
    a, b = hs.noiser.eggroll.get_lora_update_params(settings, sigma / np.sqrt(rank), iterinfo, leaf, key)
    return a @ b.T


def test_a_population_in_one_call_and_its_update(small):
    """Members by ``vmap``; the update moves everything but the embedding and the head."""
    keys = c.simple_es_tree_key(small.params, jax.random.key(3), small.scan_map)
    frozen, dynamic = EGGROLL.init_noiser(small.params, 0.1, 0.1, rank=1, noise_reuse=1)
    threads, run = jnp.arange(4), runner(small, EGGROLL, rank=1, noise_reuse=1)
    together, _ = jax.vmap(lambda thread: run(small.params, (0, thread), IDS))(threads)
    for member in range(4):
        np.testing.assert_allclose(together[member], run(small.params, (0, member), IDS)[0], atol=1e-5)
    fitnesses = EGGROLL.convert_fitnesses(frozen, dynamic, together[:, :, -1, 7].mean(1))
    iterinfos = (jnp.zeros(4, jnp.int32), threads)
    _, new = EGGROLL.do_updates(frozen, dynamic, small.params, keys, fitnesses, iterinfos, small.es_map)
    moved = jax.tree.map(lambda one, other: bool(jnp.any(one != other)), new, small.params)
    assert (moved["emb"]["weight"], moved["head"]["weight"]) == (False, False)
    assert all(jax.tree.leaves({name: value for name, value in moved.items() if name not in ("emb", "head")}))


def test_a_saved_model_is_the_same_everywhere(small, tmp_path):
    hs.models.rwkv7.save(tmp_path / "saved", small.params, small.frozen_params)
    again = hs.models.rwkv7.load(tmp_path / "saved")
    assert again.frozen_params == small.frozen_params
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    logits, _ = runner(small)(small.params, None, IDS)
    loaded = eggroll.llm.load(str(tmp_path / "saved"), dtype="float32").model
    np.testing.assert_allclose(loaded(torch.tensor(IDS)).logits.detach(), logits, atol=1e-5)


@pytest.mark.parametrize("layout", ["fla", "original"])
def test_directories_in_every_layout(layout, tmp_path):
    model = tiny_rwkv7()
    model.config.save_pretrained(tmp_path)
    tensors = {n: t.contiguous() for n, t in to_layout(model.state_dict(), layout, 32).items()}
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / file)
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    params = hs.models.rwkv7.load(tmp_path).params
    np.testing.assert_array_equal(params["blocks"]["att"]["w1"][1], model.blocks[1].att.w1)
    np.testing.assert_array_equal(params["blocks"]["att"]["v1"][1], model.blocks[2].att.v1)
    np.testing.assert_array_equal(params["ln0"]["bias"], model.blocks[0].ln0.bias)


def test_a_model_of_one_block():
    init = RWKV7.rand_init(jax.random.key(0), **{**SMALL, "num_hidden_layers": 1})
    assert "v0" not in init.params["blocks"]["att"]
    assert runner(init)(init.params, None, IDS)[0].shape == (2, 9, 40)


def test_mistakes(tmp_path):
    load = hs.models.rwkv7.load
    with pytest.raises(ConfigError, match=r"hidden_size \(=32\) must be a multiple of head_dim \(=24\)"):
        RWKV7.rand_init(jax.random.key(0), **{**SMALL, "head_dim": 24})
    with pytest.raises(ConfigError, match="sizes of at least 1"):
        RWKV7.rand_init(jax.random.key(0), **{**SMALL, "vocab_size": 0})
    with pytest.raises(ModelError, match=r"RWKV/some-model does not exist\..*hf download ID"):
        load("RWKV/some-model")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"junk\.pth cannot be read as a file of tensors"):
        load(tmp_path / "junk.pth")
    torch.save({"blocks.0.att.time_maa_x": torch.ones(1)}, tmp_path / "older.pth")
    with pytest.raises(ModelError, match="is RWKV-6; of the RWKV models, RWKV-7 is supported"):
        load(tmp_path / "older.pth")
    tensors = torch.load(saved_pth(tmp_path), weights_only=True)
    torch.save(tensors | {"blocks.2.att.w1": torch.ones(64, 3)}, tmp_path / "odd.pth")
    with pytest.raises(ModelError, match=r"blocks\.2\.att\.w1 is \(64, 3\), must be \(64, 16\)"):
        load(tmp_path / "odd.pth")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="has the model_type 'llama'"):
        load(tmp_path)
