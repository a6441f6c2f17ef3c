"""The fused vote in float32 whose products are of two bfloat16 parts, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from threads import on_threads
from torch import Tensor
from vote_cases import C, error, exactly, fused_float32, make_weights, offset_logits

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.ops import available_backends
from dmv_fast.runtime.fold import VoteWeights, fold_vote
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.runtime.vote import _split_vote, vote_plain

CPU = torch.device("cpu")


def why_not() -> str | None:
    built = available_backends("cpu")["cpu"]
    if built is not None:
        return f"dmv_fast._C is missing: {built}"
    return None if torch.ops.dmv_fast.vote_split_cpu_runs() else "needs AMX, or DMV_FAST_CPU_ISA rules it out"


needs_amx = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def fused(rows: Tensor, weights: VoteWeights) -> Tensor:
    return fused_float32(rows, weights, products="bfloat16x3")


@needs_amx
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 16, 17, 32])
@pytest.mark.parametrize("heads, value_width", [(2, 32), (4, 256), (6, 96), (8, 512)])
def test_vote_is_near_float32(heads, value_width, k):
    """37 locations: those worked on last are fewer than others."""
    weights = make_weights(heads, value_width)
    rows = torch.randn(1, 37, k, C)
    found = fused(rows, weights)
    assert error(found, exactly(rows, weights)) < 4e-5
    assert error(found, vote_plain(rows, weights)) < 4e-5


@needs_amx
@pytest.mark.parametrize("batch, locations, k", [(1, 1, 4), (3, 5, 4), (2, 11, 7), (1, 1, 32), (0, 5, 4)])
def test_vote_of_any_number_of_locations(batch, locations, k):
    weights = make_weights()
    rows = torch.randn(batch, locations, k, C)
    found = fused(rows, weights)
    assert found.shape == (batch, locations, 256)
    torch.testing.assert_close(found, vote_plain(rows, weights), atol=1e-4, rtol=1e-4)


@needs_amx
@pytest.mark.parametrize("k", [1, 3, 4, 16, 32])
def test_locations_do_not_hear_each_other(k):
    weights = make_weights()
    rows = torch.randn(1, 24, k, C)
    before = fused(rows, weights)
    rows[0, 5] = torch.randn(k, C)
    assert (fused(rows, weights) != before).any(-1)[0].nonzero().flatten().tolist() == [5]


@needs_amx
@pytest.mark.parametrize("offset", [-600, 600])
@pytest.mark.parametrize("k", [2, 4, 32])
def test_logits_whose_powers_no_float32_holds(k, offset):
    """The same number added to all logits of a candidate is nothing to a softmax."""
    rows, weights = offset_logits(offset, k)
    assert error(fused(rows, weights), exactly(rows, weights)) < 1e-4


@needs_amx
@pytest.mark.parametrize("scale, tolerance", [(10, 2e-4), (1e4, 0.05), (1e34, 0.05)])
def test_logits_far_apart(scale, tolerance):
    """They carry a part of 2^-17 of error each, which weighs the more the larger they are."""
    weights = make_weights()
    weights.to_q.mul_(scale)
    weights.q_bias.mul_(scale)
    rows = torch.randn(1, 37, 6, C)
    assert error(fused(rows, weights), exactly(rows, weights)) < tolerance


@needs_amx
@pytest.mark.parametrize("k", [4, 32])
def test_any_number_of_threads_gives_the_same_bits(k):
    weights = make_weights()
    rows = torch.randn(1, 300, k, C)
    alone, shared = on_threads((1, 2), lambda: fused(rows, weights))
    assert torch.equal(shared, alone)


@needs_amx
def test_network_of_bfloat16_parts_votes_by_it():
    torch.manual_seed(0)
    model = DMV(DMVConfig()).eval().requires_grad_(False)
    net = FastNetwork(model, dtype=torch.float32, device=CPU, backend="auto", products="bfloat16x3")
    rows, maps = torch.randn(1, 256, 4, C), net.new_maps(1)
    net.vote(maps, rows)
    found = maps.flatten(1, 2)[..., model.config.key_dim :]
    weights = fold_vote(model.read)
    assert torch.equal(found, fused(rows, weights))
    assert not torch.equal(found, vote_plain(rows, weights))


@needs_amx
def test_kernel_says_that_there_is_no_amx(monkeypatch):
    vote = _split_vote(make_weights())
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "generic")
    with pytest.raises(RuntimeError, match="vote_split_cpu: .* no AMX"):
        vote(torch.randn(1, 9, 4, C))


@needs_amx
@pytest.mark.parametrize(
    "rows, message",
    [
        (torch.randn(1, 9, 4, 32), r"rows: must be \(B, M, K, 64\)"),
        (torch.randn(9, 4, C), r"rows: must be \(B, M, K, 64\)"),
        (torch.randn(1, 9, 33, C), "rows: its K must be 1..32"),
        (torch.randn(1, 9, 0, C), "rows: its K must be 1..32"),
        (torch.randn(1, 9, 4, C).bfloat16(), "rows: must be contiguous float32 of 2304 elements"),
        (torch.randn(1, 4, 9, C).transpose(1, 2), "rows: must be contiguous float32 of 2304 elements"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(RuntimeError, match=message):
        _split_vote(make_weights())(rows)


@needs_amx
@pytest.mark.parametrize(
    "at, bad, message",
    [
        (1, torch.zeros(4096), "to_q: must be contiguous bfloat16 of 8192 elements"),
        (2, torch.zeros(48), "q_bias: must be of 2, 4, 6 or 8 heads"),
        (2, torch.zeros(160), "q_bias: must be of 2, 4, 6 or 8 heads"),
        (2, torch.zeros(64).double(), "q_bias: must be contiguous float32 of 64 elements"),
        (3, torch.zeros(4096).bfloat16(), "to_k: must be contiguous bfloat16 of 8192 elements"),
        (4, torch.zeros(4 * 8192).bfloat16(), "mix: must be contiguous bfloat16 of 40960 elements"),
        (5, torch.zeros(32), "mix_bias: must be contiguous float32 of 64 elements"),
        (6, torch.zeros(32 * 128), "out: must be contiguous bfloat16 of 4096 elements"),
        (7, torch.zeros(48), "out_bias: its length must be a multiple of 32"),
        (7, torch.zeros(0), "out_bias: its length must be a multiple of 32"),
    ],
)
def test_bad_weights(at, bad, message):
    width, half = 64, torch.bfloat16
    arguments = [
        torch.zeros(1, 9, 4, C),
        torch.zeros(width * 128, dtype=half), torch.zeros(width), torch.zeros(width * 128, dtype=half),
        torch.zeros(5 * 64 * 128, dtype=half), torch.zeros(C),
        torch.zeros(32 * 128, dtype=half), torch.zeros(32),
    ]  # fmt: skip
    torch.ops.dmv_fast.vote_split_cpu(*arguments, 1e-5)
    arguments[at] = bad
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dmv_fast.vote_split_cpu(*arguments, 1e-5)
