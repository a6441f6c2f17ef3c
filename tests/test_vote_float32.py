"""The fused vote in float32 on each instruction set, against plain PyTorch in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from threads import on_threads
from vote_cases import C, error, exactly, fused_float32, make_weights, offset_logits

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.ops import available_backends
from dmv_fast.runtime.fold import fold_vote
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.runtime.vote import _float32_vote, vote_plain

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    available_backends("cpu")["cpu"] is not None, reason="dmv_fast._C is not built here"
)


@pytest.fixture(params=["avx512", "avx2", "generic"])
def isa(request, monkeypatch) -> str:
    """Each instruction set that has a kernel of its own, where it runs."""
    if request.param not in torch.ops.dmv_fast.cpu_isas().split():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("DMV_FAST_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("k", range(1, 33))
def test_vote_is_float32(isa, k):
    """37 locations: those worked on last are fewer than others."""
    weights = make_weights(heads=8)
    rows = torch.randn(1, 37, k, C)
    found = fused_float32(rows, weights)
    assert error(found, exactly(rows, weights)) < 3e-6
    assert error(found, vote_plain(rows, weights)) < 3e-6


@pytest.mark.parametrize("k", [1, 2, 5, 32])
@pytest.mark.parametrize("heads, value_width", [(2, 32), (4, 256), (6, 96), (8, 512)])
def test_vote_of_any_number_of_heads(isa, heads, value_width, k):
    weights = make_weights(heads, value_width)
    rows = torch.randn(1, 37, k, C)
    assert error(fused_float32(rows, weights), exactly(rows, weights)) < 3e-6


@pytest.mark.parametrize("batch, locations, k", [(1, 1, 4), (3, 5, 4), (2, 11, 7), (1, 1, 32), (0, 5, 4)])
def test_vote_of_any_number_of_locations(isa, batch, locations, k):
    weights = make_weights()
    rows = torch.randn(batch, locations, k, C)
    found = fused_float32(rows, weights)
    assert found.shape == (batch, locations, 256)
    torch.testing.assert_close(found, vote_plain(rows, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("candidate", [0, -1])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 16, 32])
def test_locations_do_not_hear_each_other(isa, k, candidate):
    """Not even one that is no number, which everybody at its own location hears."""
    weights = make_weights()
    rows = torch.randn(1, 24, k, C)
    before = fused_float32(rows, weights)
    for bad in (torch.randn(C), torch.nan):
        rows[0, 5, candidate] = bad
        after = fused_float32(rows, weights)
        assert (after != before).any(-1)[0].nonzero().flatten().tolist() == [5]
    assert after[0, 5].isnan().all()


@pytest.mark.parametrize("k", [2, 3, 4, 7, 32])
def test_it_does_not_matter_which_candidate_is_first(isa, k):
    """From the first one all others are measured; here it is ten times as long as they are."""
    weights = make_weights()
    rows = torch.randn(1, 37, k, C)
    rows[:, :, 0] *= 10
    found = fused_float32(rows, weights)
    assert error(found, exactly(rows, weights)) < 1e-5
    assert error(fused_float32(rows.flip(2), weights), found) < 1e-5


@pytest.mark.parametrize("offset", [-600, 600])
@pytest.mark.parametrize("k", [2, 4, 32])
def test_logits_whose_powers_no_float32_holds(isa, k, offset):
    """The same number added to all logits of a candidate is nothing to a softmax."""
    rows, weights = offset_logits(offset, k)
    assert error(fused_float32(rows, weights), exactly(rows, weights)) < 1e-5


@pytest.mark.parametrize("scale, tolerance", [(10, 1e-5), (1e3, 1e-3), (1e34, 0.01)])
def test_logits_far_apart(isa, scale, tolerance):
    """Their error weighs the more the larger they are."""
    weights = make_weights()
    weights.to_q.mul_(scale)
    weights.q_bias.mul_(scale)
    rows = torch.randn(1, 37, 6, C)
    assert error(fused_float32(rows, weights), exactly(rows, weights)) < tolerance


@pytest.mark.parametrize("k", [4, 32])
def test_any_number_of_threads_gives_the_same_bits(isa, k):
    weights = make_weights()
    rows = torch.randn(1, 300, k, C)
    alone, shared = on_threads((1, 2), lambda: fused_float32(rows, weights))
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("split", [False, True])
def test_network_of_float32_votes_by_it(monkeypatch, split):
    """One of bfloat16 parts, too, where there is no AMX."""
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "generic")
    torch.manual_seed(0)
    model = DMV(DMVConfig()).eval().requires_grad_(False)
    net = FastNetwork(model, dtype=torch.float32, device=CPU, backend="auto", split=split)
    rows, maps = torch.randn(1, 256, 4, C), net.new_maps(1)
    net.vote(maps, rows)
    found = maps.flatten(1, 2)[..., model.config.key_dim :]
    assert torch.equal(found, _float32_vote(fold_vote(model.read))(rows))


@pytest.mark.parametrize(
    "rows, message",
    [
        (torch.randn(1, 9, 4, 32), r"rows: should be \(B, M, K, 64\)"),
        (torch.randn(1, 9, 33, C), "rows: its K should be 1..32"),
        (torch.randn(1, 9, 4, C).bfloat16(), "rows: should be contiguous float32 of 2304 elements"),
        (torch.randn(1, 4, 9, C).transpose(1, 2), "rows: should be contiguous float32 of 2304 elements"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(RuntimeError, match=message):
        _float32_vote(make_weights())(rows)


@pytest.mark.parametrize(
    "at, bad, message",
    [
        (1, torch.zeros(8192).bfloat16(), "to_q: should be contiguous float32 of 8192 elements"),
        (2, torch.zeros(64), "q_bias: should be filled up to 8 heads"),
        (2, torch.zeros(160), "q_bias: should be of 2, 4, 6 or 8 heads"),
        (3, torch.zeros(4096), "to_k: should be contiguous float32 of 8192 elements"),
        (4, torch.zeros(9 * 4096), "mix: should be contiguous float32 of 40960 elements"),
        (6, torch.zeros(4096), "out: should be contiguous float32 of 2048 elements"),
        (7, torch.zeros(48), "out_bias: its length should be a multiple of 32"),
    ],
)
def test_bad_weights(at, bad, message):
    width = 128
    arguments = [
        torch.zeros(1, 9, 4, C),
        torch.zeros(width * C), torch.zeros(width), torch.zeros(width * C),
        torch.zeros(10 * C * C), torch.zeros(C),
        torch.zeros(32 * C), torch.zeros(32),
    ]  # fmt: skip
    torch.ops.dmv_fast.vote_float32_cpu(*arguments, 1e-5)
    arguments[at] = bad
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dmv_fast.vote_float32_cpu(*arguments, 1e-5)
