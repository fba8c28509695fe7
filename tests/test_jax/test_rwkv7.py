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
NOISE, SIGMA = {"rank": 2, "noise_reuse": 1}, 0.1
IDS = np.random.default_rng(0).integers(1, 40, (2, 9))


@pytest.fixture(scope="module")
def small():
    """A model in which no parameter is the identity of what it is used for."""
    made, rng = RWKV7.rand_init(jax.random.key(1), **SMALL), np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), leaf.dtype), made.params)
    return made._replace(params=params)


@pytest.fixture(scope="module")
def plain(small):
    """The model without noise."""
    return runner(small)


def runner(init, noiser=NOOP, sigma=SIGMA, **settings):
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


def test_padding_is_stepped_over(small, plain):
    run, rows = plain, [IDS[0, :3], IDS[1]]
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


@pytest.fixture(scope="module")
def together(small):
    """Logits of the members 0 to 3 in one call, ``(4, 2, 9, V)``."""
    iterinfos = (jnp.full(4, 2), jnp.arange(4))
    return jax.vmap(runner(small, EGGROLL, **NOISE), in_axes=(None, 0, None))(small.params, iterinfos, IDS)[0]


def twins(small, frozen, dynamic):
    """The parameters of the members 0 to 3, materialized, with a leading axis."""
    keys = c.simple_es_tree_key(small.params, jax.random.key(3), small.scan_map)

    def matrix(leaf, key, iterinfo):
        sigma = dynamic["sigma"] / np.sqrt(frozen["rank"])
        a, b = hs.noiser.eggroll.get_lora_update_params(frozen, sigma, iterinfo, leaf, key)
        return leaf + a @ b.T

    def vector(leaf, key, iterinfo):
        return EGGROLL.get_noisy_standard(frozen, dynamic, leaf, key, iterinfo)

    def one(member):
        def make(leaf, key, scan, kind):
            if kind == c.EXCLUDED:
                return leaf
            noisy = {c.MM_PARAM: matrix, c.PARAM: vector}[kind]
            return jax.vmap(noisy, (0, 0, None))(leaf, key, (2, member)) if scan else noisy(leaf, key, (2, member))

        return jax.tree.map(make, small.params, keys, small.scan_map, small.es_map)

    return jax.jit(jax.vmap(one))(jnp.arange(4))


def test_every_member_is_its_materialized_twin(small, plain, together):
    params = twins(small, *EGGROLL.init_noiser(small.params, SIGMA, 0.1, **NOISE))
    np.testing.assert_array_equal(params["emb"]["weight"][1], small.params["emb"]["weight"])
    center = plain(small.params, None, IDS)[0]
    for member in range(4):
        expected = plain(jax.tree.map(lambda leaf, member=member: leaf[member], params), None, IDS)[0]
        np.testing.assert_allclose(together[member], expected, atol=2e-5)
        assert np.abs(expected - center).max() > 0.02


@pytest.mark.slow
def test_members_whose_vectors_are_frozen(small, plain):
    noisy = runner(small, EGGROLL, **NOISE, freeze_nonlora=True)
    params = twins(small, *EGGROLL.init_noiser(small.params, SIGMA, 0.1, **NOISE, freeze_nonlora=True))
    np.testing.assert_array_equal(params["blocks"]["att"]["x_r"][1], small.params["blocks"]["att"]["x_r"])
    expected = plain(jax.tree.map(lambda leaf: leaf[1], params), None, IDS)[0]
    np.testing.assert_allclose(noisy(small.params, (2, 1), IDS)[0], expected, atol=2e-5)
    np.testing.assert_array_equal(noisy(small.params, None, IDS)[0], plain(small.params, None, IDS)[0])


@pytest.mark.slow
def test_an_update_moves_all_but_the_embedding_and_the_head(small, together):
    keys = c.simple_es_tree_key(small.params, jax.random.key(3), small.scan_map)
    frozen, dynamic = EGGROLL.init_noiser(small.params, SIGMA, 0.1, use_batched_update=True, **NOISE)
    fitnesses = EGGROLL.convert_fitnesses(frozen, dynamic, together[:, :, -1, 7].mean(1))
    iterinfos = (jnp.full(4, 2), jnp.arange(4))
    _, new = EGGROLL.do_updates(frozen, dynamic, small.params, keys, fitnesses, iterinfos, small.es_map)
    moved = jax.tree.map(lambda one, other: bool(jnp.any(one != other)), new, small.params)
    assert (moved["emb"]["weight"], moved["head"]["weight"]) == (False, False)
    assert all(jax.tree.leaves({name: value for name, value in moved.items() if name not in ("emb", "head")}))


def test_a_saved_model_is_the_same_everywhere(small, plain, tmp_path):
    hs.models.rwkv7.save(tmp_path / "saved", small.params, small.frozen_params)
    again = hs.models.rwkv7.load(tmp_path / "saved")
    assert again.frozen_params == small.frozen_params
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    logits, _ = plain(small.params, None, IDS)
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
