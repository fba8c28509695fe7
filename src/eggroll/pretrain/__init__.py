"""Pretraining a language model whose weights, activations and hidden state are int8 (EGGROLL section 6.1, G to I).

    trained = train(PretrainOptions(data="book.txt", n_layers=1, hidden=64, minutes=10))
    print(sample_run(trained.run.path, "Once upon", 200))

There is no floating point in the model and no backpropagation. ``model`` has its arithmetic in NumPy, ``engines`` the
same function, bit for bit, as fast as the machine allows. Public names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eggroll._lazy import attach

if TYPE_CHECKING:
    from eggroll.pretrain.config import PretrainOptions as PretrainOptions
    from eggroll.pretrain.engines.choose import forward as forward
    from eggroll.pretrain.engines.choose import make_engine as make_engine
    from eggroll.pretrain.kind import model_of_run as model_of_run
    from eggroll.pretrain.kind import options_of_run as options_of_run
    from eggroll.pretrain.kind import sample_run as sample_run
    from eggroll.pretrain.kind import train as train
    from eggroll.pretrain.model.oracle import init_params as init_params
    from eggroll.pretrain.model.oracle import log_likelihood as log_likelihood
    from eggroll.pretrain.model.shape import ModelShape as ModelShape

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ModelShape": "eggroll.pretrain.model.shape",
        "PretrainOptions": "eggroll.pretrain.config",
        "forward": "eggroll.pretrain.engines.choose",
        "init_params": "eggroll.pretrain.model.oracle",
        "log_likelihood": "eggroll.pretrain.model.oracle",
        "make_engine": "eggroll.pretrain.engines.choose",
        "model_of_run": "eggroll.pretrain.kind",
        "options_of_run": "eggroll.pretrain.kind",
        "sample_run": "eggroll.pretrain.kind",
        "train": "eggroll.pretrain.kind",
    },
    extra="torch",
)
