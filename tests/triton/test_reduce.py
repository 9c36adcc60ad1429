from __future__ import annotations

import pytest
import torch

from effkernels.testing import assert_close_to
from effkernels.triton import reduce


@pytest.mark.parametrize(("batch", "rows", "channels"), [(1, 1, 1), (3, 33, 31), (2, 65, 40)])
def test_totals(device, batch, rows, channels):
    partials = torch.randn(batch, rows, channels)
    got = reduce.totals(partials.to(device), 0.25).cpu()
    assert_close_to(partials.double().sum(1) * 0.25, got, partials.sum(1) * 0.25)


@pytest.mark.parametrize(
    "counts", [(5,), (64, 64, 3), tuple(range(1, 41)), (3,) * 513 + (2,)], ids=len
)
def test_moments(device, counts):
    """Of values far from zero, where sums of squares alone would lose three digits."""
    blocks = [torch.randn(count, 40) + 20 for count in counts]
    partials = torch.stack(
        [torch.stack([b.sum(0), (b - b.mean(0)).square().sum(0)]) for b in blocks]
    )
    values = torch.cat(blocks)
    mean, var = reduce.moments(
        torch.tensor(counts, dtype=torch.float32).to(device), partials.to(device), len(values)
    )
    stock_var, stock_mean = torch.var_mean(values, 0, correction=0)
    due_var, due_mean = torch.var_mean(values.double(), 0, correction=0)
    assert_close_to(due_mean, mean.cpu(), stock_mean)
    assert_close_to(due_var, var.cpu(), stock_var)
