"""Modules import downwards only, inside packages too: no circle, not for types and not within a function."""

from __future__ import annotations

import graphlib

import pytest

grimp = pytest.importorskip("grimp", reason="the import linter is not installed")


def circle(imports):
    """Modules that import each other in turn, or None."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_a_circle_would_be_found():
    assert circle({"a": ["b"], "b": ["c"], "c": []}) is None
    assert set(circle({"a": ["b"], "b": ["c"], "c": ["a"]})) == {"a", "b", "c"}


def test_there_is_no_circle():
    graph = grimp.build_graph("eggroll", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    assert circle(imports) is None
