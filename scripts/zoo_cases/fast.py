"""The cases that the tests run: every kind of layer, in well under half a minute."""

FAST: frozenset[str] = frozenset({"torch/nn.Linear/0"})
