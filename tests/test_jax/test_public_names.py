"""What ``eggroll.jax`` offers."""

from __future__ import annotations

import pytest

pytest.importorskip("jax")
import eggroll.jax

# A name here is a promise to users: none may go, and a new one is added here on purpose.
PUBLIC = ["Address", "State", "Strategy", "models", "noiser", "perturb"]


def test_public_names():
    assert eggroll.jax.__all__ == PUBLIC
    assert all(hasattr(eggroll.jax, name) for name in PUBLIC)


def test_the_names_of_hyperscalees():
    """As in ``import hyperscalees as hs``; also by the path of the module."""
    from eggroll.jax.models.common import MLP
    from eggroll.jax.noiser.eggroll import EggRoll

    hs = eggroll.jax
    assert hs.noiser.eggroll.EggRoll is EggRoll is hs.noiser.all_noisers["eggroll"]
    assert hs.models.common.MLP is MLP
    for noiser in (EggRoll, hs.noiser.open_es.OpenES, hs.noiser.base_noiser.Noiser):
        for name in (
            "init_noiser",
            "do_mm",
            "do_Tmm",
            "do_emb",
            "get_noisy_standard",
            "convert_fitnesses",
            "do_updates",
        ):
            assert callable(getattr(noiser, name))
    common = (
        "MLP Linear MM TMM Embedding Parameter simple_es_tree_key recursive_scan_split merge_inits merge_frozen "
        "call_submodule PARAM MM_PARAM EMB_PARAM EXCLUDED"
    )
    assert set(common.split()) <= set(hs.models.common.__all__)
    assert {"rand_init", "forward"} <= set(dir(hs.models.base_model.Model))
