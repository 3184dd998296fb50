"""Finding the largest entries in two stages gives what one stage gives."""

from __future__ import annotations

import math

import pytest
import torch

from trtserve.plugins.engines.torch.likeliest import likeliest, most_likely


@pytest.mark.parametrize("columns", [1, 7, 64, 65, 1000, 6400, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_is_that_of_argmax(columns, dtype):
    rows = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    values, ids = most_likely(rows)
    assert torch.equal(values, rows.amax(-1))
    assert torch.equal(ids, rows.argmax(-1))


def test_rows_with_nan_say_so():
    rows = torch.zeros(3, 300)
    rows[1, 200] = math.nan
    values, _ = most_likely(rows)
    assert torch.isnan(values).tolist() == [False, True, False]


@pytest.mark.parametrize("columns", [7, 65, 1000, 6400])
@pytest.mark.parametrize("count", [1, 3, 7, 64, 900])
def test_the_largest_are_those_of_topk(columns, count):
    count = min(count, columns)
    rows = torch.randn(4, columns, generator=torch.Generator().manual_seed(count))
    values, ids = likeliest(rows, count)
    assert torch.equal(values, rows.topk(count).values)
    assert torch.equal(rows.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())
