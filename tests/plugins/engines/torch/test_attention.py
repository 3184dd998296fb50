"""Attention over blocks against a dense formula in double precision, on ragged batches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.engines.torch.attention import paged_attention
from trtserve.plugins.engines.torch.attention_terms import AttentionTerms
from trtserve.plugins.engines.torch.batch import Scheduled, pack
from trtserve.plugins.engines.torch.decode_rows import DecodeRows
from trtserve.plugins.engines.torch.kv_store import KVStore, LayerShape

CPU = torch.device("cpu")
SIZE = 4
LAYER = SimpleNamespace(layer_idx=0)


class Bare:
    """The part of a sequence that packing reads."""

    def __init__(self, total, done, block_ids):
        self.tokens = list(range(total))
        self.num_computed = done
        self.block_ids = block_ids

    @property
    def num_pending(self):
        return len(self.tokens) - self.num_computed


def dense(query, key, value, scaling, window, softcap, sinks):
    """query: [heads, total, dim], key and value: [kv_heads, total, dim] -> [total, heads, value_dim]."""
    heads, total = query.shape[0], query.shape[1]
    key, value = (x.repeat_interleave(heads // key.shape[0], 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    i, j = torch.arange(total)[:, None], torch.arange(total)[None]
    hidden = (j > i) if window is None else (j > i) | (j <= i - window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, total, 1)], -1)
    return (torch.softmax(scores, -1)[..., :total] @ value).transpose(0, 1)


def run(
    works,
    kv_heads,
    per_kv,
    key_dim,
    value_dim,
    dtype=torch.float64,
    scratch=None,
    consecutive=False,
    kept=False,
    joined=False,
    **terms,
):
    """Attend the last tokens of each (total, done) sequence; returns (got, wanted), packed alike. `kept`: decodes in
    rows of their own. `joined`: as swapped layers do it."""
    generator = torch.Generator().manual_seed(sum(total for total, _ in works))

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = kv_heads * per_kv
    store = KVStore([LayerShape(kv_heads, key_dim, value_dim)], 200, SIZE, dtype, CPU)
    free = list(range(200))[::-1] if consecutive else torch.randperm(200, generator=generator).tolist()
    work, queries, keys, values, wanted = [], {}, {}, {}, {}
    for total, done in works:
        blocks = [free.pop() for _ in range(-(-total // SIZE))]
        sequence = Bare(total, done, blocks)
        query, key, value = (
            noise(heads, total, key_dim),
            noise(kv_heads, total, key_dim),
            noise(kv_heads, total, value_dim),
        )
        slots = torch.tensor([blocks[place // SIZE] * SIZE + place % SIZE for place in range(done)], dtype=torch.long)
        store.keys[0][:, slots], store.values[0][:, slots] = key[:, :done].to(dtype), value[:, :done].to(dtype)
        scaling = terms.get("scaling", key_dim**-0.5)
        sinks = terms.get("s_aux")
        result = dense(query, key, value, scaling, terms.get("sliding_window"), terms.get("softcap"), sinks)
        queries[sequence], keys[sequence], values[sequence] = query[:, done:], key[:, done:], value[:, done:]
        wanted[sequence] = result[done:]
        work.append(Scheduled(sequence, total - done))
    rows = DecodeRows(store, 600) if kept else None
    batch = pack(work, store, {} if scratch is None else scratch, rows)
    assert kept == (batch.paged.rows is not None) or all(total - done > 1 for total, done in works)
    order = batch.sampled
    q, k, v = (torch.cat([part[sequence] for sequence in order], 1)[None].to(dtype) for part in (queries, keys, values))
    if joined:
        asked = AttentionTerms(terms.get("scaling", key_dim**-0.5), terms.get("sliding_window"), None, None)
        together = torch.cat([q, k, v], 1)[0].transpose(0, 1).contiguous()
        got = batch.paged.attend_joined(0, together, heads, asked).view(1, -1, heads, value_dim)
    else:
        got, weights = paged_attention(LAYER, q, k, v, None, paged=batch.paged, dropout=0.0, **terms)
        assert weights is None
    return got[0].double(), torch.cat([wanted[sequence] for sequence in order])


RAGGED = [(1, 0), (2, 0), (9, 8), (40, 39), (5, 4), (17, 3), (30, 0), (64, 60), (150, 149)]
TERMS = {
    "plain": {},
    "scaled": {"scaling": 0.3},
    "window": {"sliding_window": 7},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "all": {
        "scaling": 0.2,
        "sliding_window": 5,
        "softcap": 2.0,
        "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64),
    },
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 8), (12, 6)])
@pytest.mark.parametrize("kept", [True, False])
def test_ragged_batch_equals_dense_attention(name, key_dim, value_dim, kept):
    got, wanted = run(RAGGED, 2, 2, key_dim, value_dim, kept=kept, **TERMS[name])
    # sinks go through a softmax in single precision
    assert torch.allclose(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "scaled", "window"])
@pytest.mark.parametrize("works", [RAGGED, [(40, 39), (9, 8)], [(400, 399), (1, 0), (9, 8), (10, 9)]])
@pytest.mark.parametrize("kept", [True, False])
def test_joined_queries_keys_and_values_give_the_same(name, works, kept):
    got, wanted = run(works, 2, 2, 8, 8, kept=kept, joined=True, **TERMS[name])
    assert torch.allclose(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "window", "all"])
@pytest.mark.parametrize("kept", [True, False])
def test_bfloat16_is_close(name, kept):
    got, wanted = run(RAGGED, 2, 2, 16, 16, dtype=torch.bfloat16, kept=kept, **TERMS[name])
    assert torch.linalg.vector_norm(got - wanted) < 0.02 * torch.linalg.vector_norm(wanted)


@settings(max_examples=30, deadline=None)
@given(
    works=st.lists(
        st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total - 1))),
        min_size=1,
        max_size=6,
    ),
    kv_heads=st.sampled_from([1, 3]),
    per_kv=st.sampled_from([1, 3]),
    window=st.none() | st.integers(1, 70),
    kept=st.booleans(),
)
def test_any_batch_and_window(works, kv_heads, per_kv, window, kept):
    got, wanted = run(works, kv_heads, per_kv, 4, 4, sliding_window=window, kept=kept)
    assert torch.allclose(got, wanted, atol=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_one_row_with_consecutive_blocks_is_read_in_place(name):
    copied, scratch = {}, {}
    for totals, made in (((150,), scratch), ((150, 140), copied)):
        got, wanted = run([(n, n - 1) for n in totals], 2, 2, 8, 6, scratch=made, consecutive=True, **TERMS[name])
        assert torch.allclose(got, wanted, atol=1e-6, rtol=1e-5)
    assert copied and not scratch


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_number_of_decoding_rows(rows, dtype):
    got, wanted = run([(30 + 7 * number, 29 + 7 * number) for number in range(rows)], 3, 3, 8, 8, dtype=dtype)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_rows_of_very_different_length_are_gathered_apart():
    store = KVStore([LayerShape(1, 4, 4)], 400, SIZE, torch.float32, CPU)
    works = [Bare(total, total - 1, list(range(-(-total // SIZE)))) for total in (4, 1500, 4, 4)]
    batch = pack([Scheduled(sequence, 1) for sequence in works], store, {})
    assert [group.kv.num_blocks for group in batch.paged.decodes] == [375, 1]
    assert [len(group.lengths) for group in batch.paged.decodes] == [1, 3]
    assert batch.sampled[0] is works[1]
