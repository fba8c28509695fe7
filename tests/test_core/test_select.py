"""Which parameters are perturbed, chosen by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eggroll.core.select import KINDS, ParameterSpec, matches, select
from eggroll.errors import ConfigError, SelectionError

SPECS = [
    ParameterSpec("model.embed_tokens.weight", (32, 8), "embedding"),
    *(
        ParameterSpec(f"model.layers.{layer}.{part}.weight", shape, kind)
        for layer in range(2)
        for part, shape, kind in (
            ("self_attn.q_proj", (8, 8), "matrix"),
            ("self_attn.v_proj", (4, 8), "matrix"),
            ("mlp.down_proj", (8, 16), "matrix"),
            ("input_layernorm", (8,), "vector"),
        )
    ),
    ParameterSpec("conv.weight", (8, 3, 2, 2), "conv"),
    ParameterSpec("mixer.A_log", (2, 3), "other"),
]


def names(*args, **kwargs):
    return [spec.name for spec in select(SPECS, *args, **kwargs)]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", "self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", ".q_proj.", True),
        ("model.layers.0.self_attn.q_proj.weight", "proj", False),
        ("model.layers.0.self_attn.q_proj.weight", "layers.1", False),
        ("model.layers.10.self_attn.q_proj.weight", "layers.1", False),
        ("model.layers.0.self_attn.q_proj.weight", "self_attn.v_proj", False),
        ("model.layers.0.self_attn.q_proj.weight", "*.q_proj.*", True),
        ("model.layers.0.self_attn.q_proj.weight", "*.[qk]_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", "*layers.?.*", True),
        ("model.layers.10.self_attn.q_proj.weight", "*layers.?.self*", False),
        ("model.layers.0.self_attn.q_proj.weight", "q_proj*", False),
        ("Model.weight", "model", False),
    ],
)
def test_patterns(name, pattern, expected):
    assert matches(name, pattern) is expected


@given(st.lists(st.text("ab_0", min_size=1, max_size=4), min_size=1, max_size=5))
def test_every_part_and_run_of_parts_selects_its_parameter(parts):
    name = ".".join(parts)
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            assert matches(name, ".".join(parts[start:stop]))


def test_none_takes_all_matrices_in_order():
    chosen = names()
    assert chosen == [spec.name for spec in SPECS if spec.kind in ("matrix", "conv")]


def test_kinds_widen_the_default():
    assert names(kinds=("embedding", "vector")) == [s.name for s in SPECS if s.kind in ("embedding", "vector")]
    assert len(names(kinds=KINDS)) == len(SPECS)


def test_a_named_parameter_is_taken_whatever_its_kind():
    assert names(include=["input_layernorm", "embed_tokens"]) == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    ]


def test_exclude_wins_over_include():
    assert names(include=["self_attn"], exclude=["layers.0", "v_proj"]) == ["model.layers.1.self_attn.q_proj.weight"]


def test_two_patterns_that_overlap_select_once():
    assert len(names(include=["q_proj", "self_attn", "*.q_proj.*"])) == 4


def test_an_unmatched_pattern_lists_near_matches():
    with pytest.raises(SelectionError) as caught:
        names(include=["q_poj"])
    assert str(caught.value) == (
        "target_modules pattern 'q_poj' matches no parameter. Near matches: q_proj, v_proj, down_proj"
    )


@pytest.mark.parametrize("pattern", ["self_attn.q_poj", "*.q_poj.*", "layers.0.self_attn.q_poj.weight"])
def test_the_wrong_part_of_a_dotted_pattern_is_corrected(pattern):
    with pytest.raises(SelectionError, match=r"Near matches: q_proj, v_proj, down_proj$"):
        names(include=[pattern])


def test_a_pattern_that_is_part_of_a_word_finds_the_words():
    with pytest.raises(SelectionError, match=r"'attn' matches no parameter. Near matches: self_attn"):
        names(include=["attn"])
    with pytest.raises(SelectionError, match=r"'\*proj' matches no parameter. Near matches: .*down_proj"):
        names(include=["*proj"])


def test_all_unmatched_patterns_are_reported_at_once():
    with pytest.raises(SelectionError, match=r"'nothing'.*; exclude pattern 'layers\.7'"):
        names(include=["nothing", "q_proj"], exclude=["layers.7"])


def test_nothing_similar_lists_what_there_is():
    with pytest.raises(SelectionError, match=r"Parts of names in this model: A_log, conv, down_proj, embed_tokens"):
        names(include=["zzzzzz"])


def test_an_empty_selection_says_what_the_model_has():
    with pytest.raises(SelectionError) as caught:
        names(include=["q_proj"], exclude=["self_attn"])
    assert str(caught.value).startswith("nothing is left to perturb: ")
    assert "target_modules=['q_proj'], exclude=['self_attn']" in str(caught.value)
    assert "11 parameters of the kinds ['conv', 'embedding', 'matrix', 'other', 'vector']" in str(caught.value)


def test_a_model_without_matrices():
    with pytest.raises(SelectionError, match=r"nothing is left .* 1 parameters of the kinds \['vector'\]"):
        select([ParameterSpec("bias", (3,), "vector")])


def test_an_unknown_kind():
    with pytest.raises(ConfigError, match=r"kinds has \['matrices'\]; allowed are \['matrix', 'embedding', 'conv'"):
        names(kinds=("matrices",))


@pytest.mark.parametrize(
    ("spec", "matrix_shape", "batch_shape", "draw_size"),
    [
        (ParameterSpec("w", (5, 7), "matrix"), (5, 7), (), 12 * 2),
        (ParameterSpec("w", (8, 3, 2, 2), "conv"), (8, 12), (), 20 * 2),
        (ParameterSpec("w", (4, 5, 7), "experts"), (5, 7), (4,), 4 * 12 * 2),
    ],
)
def test_shapes_of_low_rank_parameters(spec, matrix_shape, batch_shape, draw_size):
    assert spec.low_rank
    assert (spec.matrix_shape, spec.batch_shape, spec.draw_size(2)) == (matrix_shape, batch_shape, draw_size)


def test_dense_parameters_draw_one_normal_an_entry():
    for kind, shape in (("vector", (9,)), ("other", (2, 3, 4))):
        spec = ParameterSpec("w", shape, kind)
        assert not spec.low_rank
        assert spec.draw_size(8) == spec.size
