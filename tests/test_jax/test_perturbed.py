"""``perturb`` against weights that are materialized by the oracle, on the forms in which JAX models come."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from jax import lax  # noqa: E402

from eggroll.core import oracle  # noqa: E402
from eggroll.core.noise_spec import NoiseSpec  # noqa: E402
from eggroll.core.select import ParameterSpec  # noqa: E402
from eggroll.errors import ConfigError, SelectionError, UnsupportedOperationError  # noqa: E402
from eggroll.jax.layout import named_leaves  # noqa: E402
from eggroll.jax.noise import Leaf, draw, draw_pairs  # noqa: E402
from eggroll.jax.perturbed import Address, MemberNoise, perturb  # noqa: E402

SIGMA, SEED, GENERATION = 0.3, 11, 5


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), seed + sum(shape)), shape)


def materialized(apply, params, x, member, rank):
    """The member's parameters by the oracle, as a pytree like ``params``."""
    leaves = {leaf.name: leaf for leaf in apply.leaves(params, x)}
    arrays = []
    for name, value in named_leaves(params).items():
        leaf = leaves.get(name)
        value = np.asarray(value, np.float64)
        if leaf is not None:
            noise = oracle.perturbation(leaf.spec, member, rank=rank, seed=SEED, generation=GENERATION)
            value = value + SIGMA * noise.reshape(leaf.shape)
        arrays.append(jnp.asarray(value, jnp.float32))
    flat, structure = jax.tree_util.tree_flatten(params)
    rest = iter(arrays)
    return jax.tree_util.tree_unflatten(structure, [next(rest) if hasattr(v, "dtype") else v for v in flat])


def check(fn, params, x, *, rank=2, members=4, tolerance=2e-5, layouts=None, jit_reference=None, **settings):
    """Every member equals its materialized twin, under jit and vmap."""
    apply = perturb(fn, rank=rank, seed=SEED, **settings)
    if layouts is not None:
        assert {leaf.name: (leaf.batch, leaf.rows) for leaf in apply.leaves(params, x)} == layouts
    run = jax.jit(jax.vmap(lambda member: apply(params, x, Address(GENERATION, member, SIGMA))))
    got = run(jnp.arange(members))
    reference = (jit_reference or jax.jit)(fn)
    plain = reference(params, x)
    for member in range(members):
        expected = reference(materialized(apply, params, x, member, rank), x)
        for mine, theirs, clean in zip(*(jax.tree.leaves(t) for t in (got, expected, plain)), strict=True):
            scale = max(1.0, float(jnp.max(jnp.abs(theirs))))
            np.testing.assert_allclose(mine[member], theirs, rtol=0, atol=tolerance * scale)
            assert mine.dtype == clean.dtype
    first = jax.tree.leaves(got)[0]
    assert not np.allclose(first[0], first[1], atol=1e-3)  # the members do differ
    return apply


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_products_on_both_sides_and_transposed(rank):
    params = {"a": normal(4, 6), "b": normal(3, 6), "c": normal(5, 3), "bias": normal(5)}

    def fn(params, x):
        h = jnp.tanh(x @ params["a"])  # (batch, 6)
        h = h @ params["b"].T  # (batch, 3)
        return params["c"] @ h.T + params["bias"][:, None]  # (5, batch)

    check(fn, params, normal(7, 4), rank=rank, layouts={"a": (0, 1), "b": (0, 1), "c": (0, 1), "bias": (0, 0)})


@pytest.mark.parametrize("rank", [1, 3])
def test_einsum_with_heads_and_contraction_over_several_axes(rank):
    params = {"query": normal(6, 2, 4), "out": normal(2, 4, 6)}

    def fn(params, x):
        q = jnp.einsum("td,dhk->thk", x, params["query"])
        return jnp.einsum("thk,hkd->td", jnp.tanh(q), params["out"])

    check(fn, params, normal(5, 6), rank=rank, layouts={"query": (0, 1), "out": (0, 2)})


def test_experts_are_a_batch_of_matrices():
    params = {"experts": normal(3, 4, 5)}
    check(
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["experts"]), params, normal(3, 2, 4), layouts={"experts": (1, 1)}
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_layers_that_are_scanned_over(rank):
    params = {"w": normal(3, 4, 4), "b": normal(3, 4)}

    def fn(params, x):
        def layer(h, p):
            return jnp.tanh(h @ p["w"] + p["b"]), h.sum()

        return lax.scan(layer, x, params)

    check(fn, params, normal(2, 4), rank=rank, layouts={"w": (1, 1), "b": (0, 0)})


def test_loops_branches_jit_remat_and_custom_derivatives():
    params = {"w": normal(4, 4) / 2}

    @jax.custom_vjp
    def product(h, w):
        return h @ w

    product.defvjp(lambda h, w: (h @ w, None), lambda kept, ct: (ct, None))

    def fn(params, x):
        w = params["w"]
        x = product(x, w)
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), x)
        h = lax.cond(x.sum() > 0, lambda h: h @ w, lambda h: h @ w.T, h)
        h = jax.jit(lambda h: jax.nn.silu(h @ w))(h)
        h = jax.checkpoint(lambda h: h @ w)(h)
        h = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ w), (0, h))[1]
        return lax.scan(lambda h, _: (jax.nn.relu(h @ w), h[0]), h, None, length=2)

    check(fn, params, normal(2, 4), tolerance=1e-4)


@pytest.mark.parametrize(("groups", "rank"), [(1, 1), (1, 3), (2, 2), (4, 1)])
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_convolutions(groups, rank, layout):
    channels, outputs = 4, 8
    kernel = {"HWIO": (3, 2, channels // groups, outputs), "OIHW": (outputs, channels // groups, 3, 2)}[layout[1]]
    x = normal(*((2, 5, 6, channels) if layout[0] == "NHWC" else (2, channels, 5, 6)))

    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["kernel"], (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=layout,
            feature_group_count=groups,
        )  # fmt: skip

    rows = 3 if layout[1] == "HWIO" else 1
    check(fn, {"kernel": normal(*kernel)}, x, rank=rank, layouts={"kernel": (0, rows)})


@pytest.mark.parametrize("rank", [1, 2])
def test_embedding_tied_to_the_head(rank):
    params = {"table": normal(9, 4)}

    def fn(params, tokens):
        h = params["table"][tokens]
        return h @ params["table"].T, jnp.take(params["table"], tokens[0], axis=0), params["table"][2]

    check(fn, params, jnp.array([[1, 8, 3], [0, 0, 2]]), rank=rank)


def test_structure_scales_casts_and_slices():
    params = {"fused": normal(6, 4), "base": normal(3, 4)}

    def fn(params, x):
        q, k = jnp.split(params["fused"], 2, axis=0)
        y = x @ (q * 0.5).T + x @ (k / 3).T + x @ (-params["base"] + 1.0).T + x @ (2.0 - params["base"]).T
        z = (
            x[:, :2] @ lax.dynamic_slice(params["fused"], (2, 1), (3, 2)).T
            + x[:, :1] @ lax.slice(params["fused"], (1, 3), (6, 4), (2, 1)).T
        )
        return y, z, params["fused"].reshape(2, 3, 4)[1] @ x.T

    check(fn, params, normal(2, 4))


def test_a_cast_weight():
    def fn(params, x):
        return x.astype(jnp.float16) @ params["w"].astype(jnp.float16).T

    check(fn, {"w": normal(3, 4)}, normal(2, 4), tolerance=4e-3)  # four units of float16's 2^-10


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_any_shape(batch, m, n, rank, transposed, seed):
    params = {"w": normal(m, n, seed=seed)}
    x = normal(batch, n if transposed else m, seed=seed)
    apply = perturb(lambda p, x: x @ (p["w"].T if transposed else p["w"]), rank=rank, seed=SEED)
    for member in range(2):
        got = apply(params, x, Address(GENERATION, member, SIGMA))
        expected = x @ (materialized(apply, params, x, member, rank)["w"].T if transposed else
                        materialized(apply, params, x, member, rank)["w"])  # fmt: skip
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_low_precision_adds_its_low_rank_part_in_float32():
    params = {"w": normal(64, 32).astype(jnp.bfloat16)}
    x = normal(8, 64).astype(jnp.bfloat16)
    apply = perturb(lambda p, x: x @ p["w"], rank=4, seed=SEED)
    got = apply(params, x, Address(GENERATION, 0, SIGMA)).astype(jnp.float32)
    exact = x.astype(jnp.float32) @ materialized(apply, params, x, 0, 4)["w"]
    plain = (x @ materialized(apply, params, x, 0, 4)["w"].astype(jnp.bfloat16)).astype(jnp.float32)
    # The rule of FlashAttention's tests: at most twice the error of the plain low-precision product.
    assert float(jnp.abs(got - exact).max()) <= 2 * float(jnp.abs(plain - exact).max())


def test_noise_drawn_in_advance_is_the_noise_of_the_address():
    params, x = {"w": normal(4, 3), "b": normal(3)}, normal(2, 4)
    apply = perturb(lambda p, x: x @ p["w"] + p["b"], rank=2, seed=SEED)
    leaves = apply.leaves(params, x)
    drawn = apply.draw(leaves, GENERATION, jnp.arange(3))
    for member in range(6):
        noise = jax.tree.map(lambda value, pair=member // 2: value[pair], drawn)
        sign = 1 - 2 * (member % 2)
        early = apply(params, x, MemberNoise(noise, jnp.float32(SIGMA * sign)))
        late = apply(params, x, Address(GENERATION, member, SIGMA))
        np.testing.assert_allclose(early, late, rtol=0, atol=1e-6)


def test_draws_in_groups_are_the_draws_one_by_one():
    leaves = [Leaf("a", (3, 4), 0, 1), Leaf("v", (3,), 0, 0), Leaf("b", (3, 4), 0, 1)]
    noise = NoiseSpec(3, 2)
    many = draw_pairs(noise, leaves, 1, jnp.arange(3))
    assert list(many) == ["a", "v", "b"]
    for leaf in leaves:
        for pair in range(3):
            one = draw(noise, leaf, 1, pair)
            jax.tree.map(lambda x, y, p=pair: np.testing.assert_array_equal(x[p], y), many[leaf.name], one)


def test_selection_by_path():
    params, x = {"enc": {"w": normal(4, 4), "b": normal(4)}, "head": normal(4, 2)}, normal(3, 4)

    def fn(p, x):
        return (x @ p["enc"]["w"] + p["enc"]["b"]) @ p["head"]

    check(fn, params, x, include=("enc",), exclude=("b",), layouts={"enc.w": (0, 1)})
    with pytest.raises(SelectionError, match=r"pattern 'encoder' matches no parameter\. Near matches: enc"):
        perturb(fn, include=("encoder",)).leaves(params, x)


def test_unsupported_primitive_names_parameter_and_primitive():
    params, x = {"mixing": normal(4, 4)}, normal(2, 4)

    def fn(p, x):
        return x @ jax.nn.softmax(p["mixing"], axis=-1)

    with pytest.raises(
        UnsupportedOperationError, match=r"parameter 'mixing', of shape \(4, 4\) here, is used in 'reduce_max'"
    ) as error:
        perturb(fn).leaves(params, x)
    assert "exclude=('mixing',)" in str(error.value)
    assert "materialize=('mixing',)" in str(error.value)
    check(fn, params, x, materialize=("mixing",))
    with pytest.raises(ConfigError, match="materialize pattern 'mix' matches no perturbed parameter; those are mixing"):
        perturb(fn, materialize=("mix",)).leaves(params, x)


def test_a_reduction_over_a_weight_is_no_call():
    def fn(p, x):
        return lax.reduce(p["w"], jnp.float32(0), lambda a, b: a * 0.5 + b, (0,)) + x

    with pytest.raises(UnsupportedOperationError, match=r"'w'.*is used in 'reduce'"):
        perturb(fn).leaves({"w": normal(4, 3)}, normal(3))


def test_weights_that_become_a_carry_or_a_result():
    params, x = {"w": normal(3, 3)}, normal(2, 3)

    def carried(p, x):
        return lax.scan(lambda w, row: (w * 0.9, row @ w), p["w"], x)[1]

    with pytest.raises(UnsupportedOperationError, match=r"scan \(as its carry\)"):
        perturb(carried).leaves(params, x)
    check(carried, params, x, materialize=("w",))
    check(lambda p, x: {"y": x @ p["w"], "w": p["w"]}, params, x)  # a result is materialized


def test_all_settings_that_cannot_work_are_named():
    with pytest.raises(ConfigError, match=r"rank \(=0\) must be a whole number of at least 1") as error:
        perturb(lambda p, x: x, rank=0, noise_reuse=-1)
    assert "noise_reuse (=-1)" in str(error.value)


def test_one_sided_members_have_draws_of_their_own():
    params, x = {"w": normal(4, 3)}, normal(2, 4)
    apply = perturb(lambda p, x: x @ p["w"], seed=SEED, antithetic=False)
    clean = x @ params["w"]
    shift = [apply(params, x, Address(0, member, SIGMA)) - clean for member in range(2)]
    assert not np.allclose(shift[0], -shift[1], atol=1e-3)
    spec = ParameterSpec("w", (4, 3), "matrix")
    expected = SIGMA * np.asarray(x) @ oracle.perturbation(spec, 1, rank=1, seed=SEED, generation=0, antithetic=False)
    np.testing.assert_allclose(shift[1], expected, atol=1e-5)


def test_two_weights_meet_in_a_product():
    """One of them was added to an array, so it may be made as it is."""
    params = {"w": normal(4, 4), "b": normal(1, 4), "pos": normal(3, 4, seed=1)}
    check(lambda p, x: (x @ p["w"] + p["b"]) @ p["w"], params, normal(3, 4))
    check(lambda p, x: (x + p["pos"]) @ p["w"], params, normal(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("multiply", (3, 4)), ("divide", (1, 4)), ("add", (1, 4)), ("subtract", (3, 4)), ("maximum", (1, 4))],
)
def test_biases_and_scales_of_two_axes_have_dense_noise(name, shape):
    use = getattr(jnp, name)
    params = {"w": normal(4, 4), "g": 2.0 + 0.1 * normal(*shape)}
    layouts = {"w": (0, 1), "g": (0, 0)}
    check(lambda p, x: use(x @ p["w"], p["g"]), params, normal(5, 3, 4), layouts=layouts)


def test_embeddings_that_are_read_row_by_row():
    params, tokens = {"w": normal(7, 4)}, jnp.array([0, 6, 2, -1, 2])
    check(lambda p, x: jax.vmap(lambda i: p["w"][i])(x), params, tokens)
    check(lambda p, x: jax.vmap(jax.vmap(lambda i: p["w"][:, i]))(x), params, jnp.array([[0, 3], [1, 2]]))
    check(lambda p, x: jnp.take(p["w"], x, axis=0, mode="fill", fill_value=0.0), params, jnp.array([0, 7, -9, -1, 3]))
    check(lambda p, x: p["w"][:, x] @ jnp.ones(3), {"w": normal(4, 1)}, jnp.array([0, 0, 0]))


def test_a_barrier_to_the_optimizer_of_the_compiler():
    check(lambda p, x: x @ lax.optimization_barrier(p["w"]), {"w": normal(4, 3)}, normal(2, 4))
