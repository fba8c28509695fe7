"""Models: their four trees, their forward pass and the tree of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll.jax as hs
from eggroll.errors import ConfigError, UnsupportedOperationError

c = hs.models.common
NOOP = hs.noiser.base_noiser.Noiser
EGGROLL = hs.noiser.eggroll.EggRoll
KEY = jax.random.key(0)


def forward(model, init, *args, noiser=NOOP, iterinfo=None, base_key=KEY, **settings):
    frozen, dynamic = noiser.init_noiser(init.params, 0.3, 0.1, **settings)
    keys = c.simple_es_tree_key(init.params, base_key, init.scan_map)
    return model.forward(noiser, frozen, dynamic, init.frozen_params, init.params, keys, iterinfo, *args)


def test_names():
    for name in c.__all__:
        assert getattr(c, name) is not None
    assert (c.PARAM, c.MM_PARAM, c.EMB_PARAM, c.EXCLUDED) == (0, 1, 2, 3)
    assert issubclass(c.MLP, hs.models.base_model.Model)
    assert set(hs.noiser.all_noisers) == {"noop", "eggroll", "open_es"}


def test_parameter():
    init = c.Parameter.rand_init(KEY, shape=(4, 5), scale=0.5, raw_value=None, dtype="bfloat16")
    assert (init.params.shape, init.params.dtype, init.es_map) == ((4, 5), jnp.bfloat16, c.PARAM)
    raw = c.Parameter.rand_init(KEY, raw_value=np.arange(3), dtype="float16")
    np.testing.assert_array_equal(forward(c.Parameter, raw), np.arange(3, dtype=np.float16))
    with pytest.raises(ConfigError, match="needs a shape or a raw_value"):
        c.Parameter.rand_init(KEY)
    with pytest.raises(ConfigError, match=r"raw_value has the shape \(3,\), but shape \(=\(4,\)\) was asked for"):
        c.Parameter.rand_init(KEY, shape=(4,), raw_value=np.arange(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_and_embedding(dtype):
    x = jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3)
    mm, tmm = (model.rand_init(KEY, in_dim=3, out_dim=7, dtype=dtype) for model in (c.MM, c.TMM))
    assert (mm.params.shape, tmm.params.shape) == ((7, 3), (3, 7))
    assert (mm.params.dtype, mm.es_map, tmm.es_map) == (dtype, c.MM_PARAM, c.MM_PARAM)
    np.testing.assert_array_equal(forward(c.MM, mm, x), x @ mm.params.T)
    np.testing.assert_array_equal(forward(c.TMM, tmm, x), x @ tmm.params)
    emb = c.Embedding.rand_init(KEY, in_dim=11, out_dim=4, dtype=dtype)
    assert (emb.params.shape, emb.es_map) == ((11, 4), c.EMB_PARAM)
    ids = jnp.array([[3, 0], [10, 3]])
    np.testing.assert_array_equal(forward(c.Embedding, emb, ids), emb.params[ids])


@pytest.mark.parametrize("activation", list(c.ACTIVATIONS))
@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_is_its_layers(activation, use_bias):
    init = c.MLP.rand_init(
        KEY, in_dim=3, out_dim=2, hidden_dims=[8, 5], use_bias=use_bias, activation=activation, dtype="float32"
    )
    x = jax.random.normal(jax.random.key(1), (4, 3))
    y = x
    for index in range(3):
        layer = init.params[str(index)]
        assert set(layer) == ({"weight", "bias"} if use_bias else {"weight"})
        y = y @ layer["weight"].T + layer.get("bias", 0)
        y = c.ACTIVATIONS[activation](y) if index < 2 else y
    np.testing.assert_allclose(forward(c.MLP, init, x), y, rtol=1e-6)
    assert init.frozen_params["activation"] == activation
    with pytest.raises(ConfigError, match=r"activation \(='swish2'\) must be one of gelu, identity, pqn"):
        c.MLP.rand_init(KEY, 3, 2, [8], True, "swish2", "float32")


def test_layer_norm():
    x = np.random.default_rng(0).normal(2, 3, (5, 16))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(c.layer_norm(jnp.float32(x)), expected, atol=1e-5)
    assert c.layer_norm(jnp.bfloat16(x)).dtype == jnp.bfloat16
    np.testing.assert_allclose(c.ACTIVATIONS["pqn"](jnp.float32(x)), np.maximum(expected, 0), atol=1e-5)


def test_merging_and_calling():
    class Twice(hs.models.base_model.Model):
        @classmethod
        def rand_init(cls, key, dim):
            parts = c.merge_inits(inner=c.Linear.rand_init(key, dim, dim), gain=c.Parameter.rand_init(key, (dim,)))
            return c.merge_frozen(parts, times=2)

        @classmethod
        def _forward(cls, common_params, x, *, offset=0):
            for _ in range(common_params.frozen_params["times"]):
                x = c.call_submodule(c.Linear, "inner", common_params, x)
            return x * c.call_submodule(c.Parameter, "gain", common_params) + offset

    init = Twice.rand_init(KEY, 4)
    assert init.es_map == {"inner": {"weight": c.MM_PARAM, "bias": c.PARAM}, "gain": c.PARAM}
    x, weight = jnp.ones(4), init.params["inner"]["weight"]
    np.testing.assert_allclose(forward(Twice, init, x), (weight @ (weight @ x)) * init.params["gain"], rtol=1e-6)
    common = hs.models.base_model.CommonParams(NOOP, {}, {}, None, init.params, init.params, None)
    with pytest.raises(
        ConfigError, match="there is no part 'iner' in this model, only: gain, inner; did you mean 'inner'"
    ):
        c.call_submodule(c.Linear, "iner", common, x)
    with pytest.raises(UnsupportedOperationError, match="Model does not implement rand_init"):
        hs.models.base_model.Model.rand_init(KEY)
    with pytest.raises(UnsupportedOperationError, match="Model does not implement _forward"):
        forward(hs.models.base_model.Model, init, x)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_tree_of_keys(make_key):
    params = {"b": jnp.zeros(3), "a": {"w": jnp.zeros((2, 4, 5)), "v": jnp.zeros((2, 3, 4, 5))}}
    scan_map = {"b": (), "a": {"w": (0,), "v": (0, 1)}}
    keys = c.simple_es_tree_key(params, make_key(7), scan_map)
    split = jax.random.split(make_key(7), 3)  # in the order a.v, a.w, b
    data = jax.random.key_data
    np.testing.assert_array_equal(data(keys["b"]), data(split[2]))
    np.testing.assert_array_equal(data(keys["a"]["w"]), data(jax.random.split(split[1], 2)))
    nested = [data(jax.random.split(key, 3)) for key in jax.random.split(split[0], 2)]
    np.testing.assert_array_equal(data(keys["a"]["v"]), nested)
    with pytest.raises(ConfigError, match="scan_map must have the structure of params"):
        c.simple_es_tree_key(params, make_key(7), {"b": ()})


def test_scanned_layers_equal_separate_ones():
    """A stack under lax.scan, forward and update, against the same layers with the same keys one by one."""
    layers, dim, members = 3, 6, 8
    stack = {"weight": 0.3 * jax.random.normal(KEY, (layers, dim, dim)), "bias": jnp.zeros((layers, dim))}
    keys = c.simple_es_tree_key(stack, jax.random.key(1), {"weight": (0,), "bias": (0,)})
    es_map = {"weight": c.MM_PARAM, "bias": c.PARAM}
    frozen, dynamic = EGGROLL.init_noiser(stack, 0.1, 0.5, rank=2, noise_reuse=1)
    base_model = hs.models.base_model

    def layer(params, keys, iterinfo, x):
        return c.Linear._forward(base_model.CommonParams(EGGROLL, frozen, dynamic, None, params, keys, iterinfo), x)

    x, iterinfo = jnp.ones(dim), (2, 5)
    scanned, _ = jax.lax.scan(lambda x, both: (layer(*both, iterinfo, x), None), x, (stack, keys))
    y = x
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], (stack, keys)) for i in range(layers)]
    for part in parts:
        y = layer(*part, iterinfo, y)
    np.testing.assert_allclose(scanned, y, rtol=1e-6)

    fitnesses = jnp.sin(jnp.arange(members) * 1.7)
    rest = (fitnesses, (jnp.full(members, 2), jnp.arange(members)))
    for batched in (False, True):
        frozen["use_batched_update"] = batched
        _, new = EGGROLL.do_updates(frozen, dynamic, stack, keys, *rest, es_map)
        for index, (params, part_keys) in enumerate(parts):
            state = {**dynamic, "opt_state": optax.sgd(0.5).init(params)}
            _, expected = EGGROLL.do_updates(frozen, state, params, part_keys, *rest, es_map)
            for name in params:
                np.testing.assert_allclose(new[name][index], expected[name], rtol=1e-6, atol=1e-7)
                assert not np.array_equal(params[name], expected[name])
