"""What a block takes for a row that is not finite."""

import math

import pytest
import torch

from wakesleep.ttl.model import ModelConfig, TTLModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "values, counted",
    [
        ([math.inf], True),
        ([-math.inf], True),
        ([math.nan], True),
        ([math.inf, -math.inf], True),
        ([1e37] * 16, False),
        ([-0.0] * 16, False),
    ],
)
def test_rows_with_any_value_that_is_not_finite_are_masked_and_counted(values, counted, dtype):
    shape = {"vocab_size": 20, "dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    config = ModelConfig(**shape, mlp_dim=16, window=8, chunk=8, memory_layers=(), store_layers=())
    model = TTLModel(config).to(dtype)
    with torch.no_grad():
        model.embedding.weight[7, : len(values)] = torch.tensor(values)
        _, _, stats = model(torch.tensor([[3, 7, 4]]), model.init_state(1), head=False)
    assert stats.nonfinite.tolist() == [int(counted)]
