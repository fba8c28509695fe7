"""Parameters that are no whole arrays of numbers, and sizes that meet the number of rows of the first small call."""

import copy

import pytest
import torch
from torch import distributed, nn

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population
from eggroll.torch.layout.rows import LEARNING_ROWS


def lazy():
    return nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))


def meta():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lazy, r"parameter '1\.weight' has no shape yet \(a lazy module\): call the model once, then make its Popula"),
        (meta, r"parameter '1\.weight' is on the meta device and has no numbers: load the weights first .*exclude=\["),
    ],
)
def test_parameters_without_numbers(build, message):
    with pytest.raises(UnsupportedOperationError, match=message):
        Population(build(), population_size=4)


def test_what_is_left_alone_may_be_without_numbers():
    Population(meta(), population_size=4, exclude=["1"])
    model = lazy()
    model(torch.randn(2, 3))
    assert len(Population(model, population_size=4).specs) == 4


def test_parameters_split_over_devices(tmp_path):
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = nn.Linear(4, 2)
        whole = copy.deepcopy(model)
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(UnsupportedOperationError, match=r"parameter 'weight' is split over devices \(FSDP2"):
            Population(model, population_size=4)
        Population(whole, population_size=4)
    finally:
        distributed.destroy_process_group()


class Pooled(nn.Module):
    """Adds features of positions, of which there are as many as a length pooled in the model."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        length = x.shape[1] // 2
        positions = torch.sin(torch.arange(length * 6, dtype=x.dtype).view(length, 6))
        return self.embed(x)[:, :length] + self.position(positions)


@pytest.mark.parametrize("pooled", LEARNING_ROWS)
def test_a_size_made_in_the_model_may_be_the_number_of_rows_that_is_tried(pooled, agree, filled):
    agree(filled(Pooled()), ((torch.randn(2, 2 * pooled + 1, 6),), {}))
