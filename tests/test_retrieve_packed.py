"""float32 retrieval over keys laid out for bfloat16 products: against the reference, on what decides it."""

from __future__ import annotations

import pytest
import torch
from threads import on_threads
from torch import Tensor
from torch.nn import functional as F

from dmv_fast import ops
from dmv_fast.ops.packed import (
    bytes_before_blocks,
    from_tiles,
    pack_keys,
    packed_width,
    parts_in_a_row,
    retrieve_packed,
    retrieve_packed_reference,
    screening_runs,
    tiles_run,
    to_tiles,
    unpack_keys,
    without_bytes,
)
from dmv_fast.ops.parts import bfloat16_parts

SIZES = [(1, 256, 8192, 256), (2, 37, 352, 96), (1, 5, 32, 512)]
needs_amx = pytest.mark.skipif(not tiles_run(), reason="no AMX in this processor, or no C++ extension")
needs_bfloat16 = pytest.mark.skipif(
    not (tiles_run() or screening_runs()), reason="no bfloat16 in this processor, or no C++ extension"
)


def rows(*shape: int, length: float) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1) * length


def test_two_parts_leave_a_hundred_thousandth():
    x = torch.randn(3, 48, 64) * torch.logspace(-6, 6, 64)
    assert ((from_tiles(to_tiles(x)) - x).abs() <= 2**-16 * x.abs()).all()
    assert torch.equal(parts_in_a_row(x).float().unflatten(-1, (2, 64)).sum(-2), from_tiles(to_tiles(x)))
    assert bfloat16_parts(x.bfloat16().float())[1].count_nonzero() == 0


def test_bytes_leave_the_numbers_as_they_are():
    x = torch.randn(3, 64, 96).mT
    laid = bytes_before_blocks(x)
    assert torch.equal(without_bytes(laid), x)
    assert laid.shape == (3, 96, 5 * 64 + 16)
    whole = laid.view(torch.int8).flatten(1)[:, : 32 * 64].view(3, 32, 64)
    numbers = laid.flatten(1)[:, 32 * 64 : 32 * 80].contiguous().view(torch.float32)
    scale, sums, off, length = numbers.view(3, 4, 32).unbind(1)
    rows = x[:, :32]
    assert torch.equal(sums, 128.0 * whole.int().sum(-1))
    assert ((whole * scale[..., None] - rows).abs() <= 0.501 * scale[..., None]).all()
    assert ((whole * scale[..., None] - rows).norm(dim=-1) <= off * 1.00001).all()
    assert (off < 0.02 * length).all() and torch.allclose(length, rows.norm(dim=-1))


def test_keys_need_the_room_that_is_said():
    keys = pack_keys(rows(2, 64, 96, length=1))
    assert (keys.shape[-1], keys.dtype) == packed_width(96)
    torch.testing.assert_close(unpack_keys(keys).norm(dim=-1), torch.ones(2, 64))


@needs_bfloat16
@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize("batch, queries, keys, depth", SIZES)
def test_equals_the_float32_retrieval(batch, queries, keys, depth, k):
    torch.manual_seed(k)
    query, memory = rows(batch, queries, depth, length=20), rows(batch, keys, depth, length=1)
    scores, indices = retrieve_packed(query, pack_keys(memory), k)
    expected, columns = ops.retrieve(query, memory, k, backend="reference")
    torch.testing.assert_close(scores, expected, atol=1e-7, rtol=2e-4 if tiles_run() else 1e-2)
    agree = (indices == columns).float().mean()
    rounded = ops.retrieve(query.bfloat16(), memory.bfloat16(), k, backend="reference")[1]
    assert agree >= 0.998 and agree >= (rounded == columns).float().mean()


@needs_bfloat16
def test_two_keys_that_bfloat16_cannot_tell_apart():
    depth = 64
    query = torch.zeros(1, 1, depth)
    query[..., 0] = 16
    memory = torch.zeros(1, 32, depth)
    memory[0, :3, 0] = torch.tensor([1.0, 1.0 + 2**-10, 1.0 - 2**-10])
    assert len(memory.bfloat16()[0, :3, 0].unique()) == 1
    _, indices = retrieve_packed(query, pack_keys(memory), 3)
    assert indices.flatten().tolist() == [1, 0, 2]


@needs_bfloat16
def test_valid_keys_alone_count_and_threads_change_nothing():
    torch.manual_seed(0)
    query, memory = rows(2, 70, 64, length=10), pack_keys(rows(2, 512, 64, length=1))
    valid = torch.tensor([160, 0], dtype=torch.int32)
    answers = on_threads((1, 3), lambda: retrieve_packed(query, memory, 4, valid=valid))
    scores, indices = answers[0]
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert indices[0].max() < 160 and (indices[1] == -1).all()
    expected = retrieve_packed_reference(query, memory, 4, valid)
    torch.testing.assert_close(scores, expected[0], atol=1e-7, rtol=1e-4 if tiles_run() else 1e-2)
    cut = retrieve_packed(query[:1], memory[:1], 4, valid=160)
    assert torch.equal(cut[0], scores[:1]) and torch.equal(cut[1], indices[:1])
    assert (retrieve_packed(query, memory, 4, valid=0)[1] == -1).all()


@needs_amx
def test_wrong_rows_are_refused():
    query, memory = rows(1, 4, 64, length=1), pack_keys(rows(1, 64, 64, length=1))
    for bad in (query[..., :48], query[0]):
        with pytest.raises(RuntimeError, match="query: must be bfloat16 .B, M, 2 D., D a multiple of 32"):
            retrieve_packed(bad, memory, 4)
    for bad in (memory[:, :40], memory[..., :64], memory[:, ::2]):
        with pytest.raises(RuntimeError, match="keys: must be .B, N, 2 D., N a multiple of 32"):
            retrieve_packed(query, bad, 4)
    for bad in ([40], [-32], [96]):
        with pytest.raises(RuntimeError, match="valid: must lie in 0..N, multiples of 32"):
            retrieve_packed(query, memory, 4, valid=torch.tensor(bad, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="valid: must be int32"):
        retrieve_packed(query, memory, 4, valid=torch.tensor([32], dtype=torch.int32).expand(9))
    for bad in (-32, 96):
        with pytest.raises(ValueError, match=f"valid: is {bad}, it must be 0..64"):
            retrieve_packed(query, memory, 4, valid=bad)
    with pytest.raises(RuntimeError, match="k: must be 1..32"):
        retrieve_packed(query, memory, 33)
