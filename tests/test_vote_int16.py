"""The vote whose last layer is in whole numbers of 16 bits: near float64, and where such could go wrong."""

from __future__ import annotations

import pytest
import torch
from threads import on_threads
from vote_cases import GOOD, C, as_candidates, error, exactly, fused_float32, make_weights

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.runtime.convolution import int16_runs
from dmv_fast.runtime.fold import VoteWeights, fold_vote
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.runtime.vote import SpreadVote, vote_plain

needs_int16 = pytest.mark.skipif(
    not int16_runs(), reason="no AVX512_VNNI in this processor, or no C++ extension"
)


def vote(rows: torch.Tensor, weights: VoteWeights) -> torch.Tensor:
    return fused_float32(rows, weights, products="int16")


@needs_int16
@pytest.mark.parametrize("k", range(1, 33))
def test_vote_is_near_float64(k):
    weights = make_weights(heads=8)
    rows = torch.randn(1, 37, k, C)
    off = error(vote(rows, weights), exactly(rows, weights))
    assert 3e-6 < off < 3e-4, "whole numbers, and no worse than these are"


@needs_int16
@pytest.mark.parametrize("k", [1, 5, 32])
@pytest.mark.parametrize("value_width", [32, 96, 512])
def test_values_of_any_width(value_width, k):
    weights = make_weights(4, value_width)
    rows = torch.randn(2, 37, k, C)
    assert error(vote(rows, weights), exactly(rows, weights)) < 3e-4


@needs_int16
def test_no_sum_overflows():
    """Candidates that are all their column, as long as a normalised one can be; columns of unlike lengths."""
    weights = make_weights()
    out = torch.randn(256, C)
    out = (out - out.mean(1, keepdim=True)) * torch.logspace(-6, 6, 256)[:, None]
    out[7], out[8], out[9, 1:] = 0, out[8].sign(), 0
    weights = weights._replace(out=out, out_bias=torch.zeros(256))
    weights.mix.zero_()
    weights.mix_bias.zero_()
    weights.mix[:, -C:] = torch.eye(C)
    rows = 1e3 * (out / out.norm(dim=1, keepdim=True).clamp(min=1e-9)).view(1, 64, 4, C)
    found, expected = vote(rows, weights), exactly(rows, weights)
    own = expected.abs().amax((0, 1))  # of each column
    assert ((found - expected).abs().amax((0, 1)) <= 3e-4 * own).all()


@needs_int16
@pytest.mark.parametrize("k", [1, 2, 4, 32])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_candidate_that_is_no_number_spoils_its_location_alone(k, poison):
    weights = make_weights()
    rows = torch.randn(1, 24, k, C)
    before = vote(rows, weights)
    rows[0, 5, -1, 3] = poison
    after = vote(rows, weights)
    assert after[0, 5].isnan().all()
    after[0, 5] = before[0, 5]
    assert torch.equal(after, before)


@needs_int16
def test_a_weight_that_is_no_number_spoils_its_channel_alone():
    weights, rows = make_weights(), torch.randn(1, 9, 4, C)
    before = vote(rows, weights)
    weights.out[3, 5] = torch.nan
    after = vote(rows, weights)
    assert after[..., 3].isnan().all()
    after[..., 3] = before[..., 3]
    assert torch.equal(after, before)


@needs_int16
def test_any_number_of_threads_gives_the_same_bits():
    weights, rows = make_weights(), torch.randn(1, 300, 4, C)
    alone, shared = on_threads((1, 2), lambda: vote(rows, weights))
    assert torch.equal(shared, alone)


@needs_int16
def test_network_of_whole_numbers_votes_by_it():
    torch.manual_seed(0)
    model = DMV(DMVConfig()).eval().requires_grad_(False)
    where = {"dtype": torch.float32, "device": torch.device("cpu"), "backend": "auto"}
    net = FastNetwork(model, products="int16", **where)
    assert isinstance(net._vote, SpreadVote)
    rows, maps = torch.randn(1, 256, 4, C), net.new_maps(1)
    net.vote(maps, as_candidates(net._vote, rows))
    found = maps.flatten(1, 2)[..., model.config.key_dim :]
    assert 3e-6 < error(found, vote_plain(rows, fold_vote(model.read))) < 3e-4


ARGUMENTS = {**GOOD, "out": torch.zeros(32 * C, dtype=torch.int16), "out_scale": torch.ones(32)}


@needs_int16
@pytest.mark.parametrize(
    "name, bad, message",
    [
        ("out", torch.zeros(32 * C), "must be contiguous int16 of 2048 elements"),
        ("out", torch.zeros(31 * C, dtype=torch.int16), "must be contiguous int16 of 2048 elements"),
        ("out_scale", torch.ones(31), "must be contiguous float32 of 32 elements"),
    ],
)
def test_bad_arguments(name, bad, message):
    torch.ops.dmv_fast.vote_float32_cpu(*ARGUMENTS.values(), 1e-5)
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        torch.ops.dmv_fast.vote_float32_cpu(*{**ARGUMENTS, name: bad}.values(), 1e-5)


@needs_int16
def test_a_processor_without_is_told(monkeypatch):
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "avx2")
    with pytest.raises(RuntimeError, match="out_scale: this processor has no AVX512_VNNI"):
        torch.ops.dmv_fast.vote_float32_cpu(*ARGUMENTS.values(), 1e-5)
