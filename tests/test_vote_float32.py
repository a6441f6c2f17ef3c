"""The fused vote in float32 on each instruction set, against plain PyTorch in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from threads import on_threads
from vote_cases import GOOD, C, as_candidates, error, exactly, fused_float32, make_weights, offset_logits

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.ops import available_backends
from dmv_fast.ops.gather import gather_reference
from dmv_fast.runtime.fold import fold_vote
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.runtime.vote import Chosen, RowVote, SpreadVote, fused_vote, vote_plain

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


def some_memory(batch: int, locations: int, k: int) -> Chosen:
    """Values, what each location adds, and candidates of unlike scores, the null column's among them."""
    torch.manual_seed(1)
    indices = torch.randint(-1, 50, (batch, locations, k), dtype=torch.int32)
    values, query_part = torch.randn(batch, 50, C), torch.randn(batch, locations, C)
    return Chosen(values, query_part, indices, torch.rand(indices.shape))


@pytest.mark.parametrize("batch, locations, k", [(1, 70, 1), (2, 37, 2), (3, 45, 4), (1, 33, 9), (2, 5, 32)])
def test_candidates_of_a_memory(isa, batch, locations, k):
    """As gathered first: weighted, with the location's part, and the null column's value."""
    weights = make_weights()._replace(null=torch.randn(C))
    values, query_part, indices, scores = some_memory(batch, locations, k)
    rows = gather_reference(
        values.double(), weights.null.double(), query_part.double(), indices, scores.double()
    )
    vote, found = SpreadVote(weights), torch.empty(batch, locations, 256)
    vote(vote.gather(vote.store(values), query_part, indices, scores), found)
    assert error(found, exactly(rows, weights)) < 3e-6


def test_more_room_in_the_memory_than_values(isa):
    """Rows of any stride, and what lies behind the last value is not read."""
    vote = SpreadVote(make_weights())
    values, *candidates = some_memory(2, 9, 4)
    expected, found = torch.empty(2, 2, 9, 256)
    vote(vote.gather(vote.store(values), *candidates), expected)
    room = torch.full((2, 64, vote.width + 16), torch.nan)
    room[:, :50, : vote.width] = vote.store(values)
    vote(vote.gather(room[..., : vote.width], *candidates), found)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("products", ["own", "bfloat16x3"])
def test_network_of_float32_votes_by_it(monkeypatch, products):
    """One of bfloat16 parts, too, where there is no AMX."""
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "generic")
    torch.manual_seed(0)
    model = DMV(DMVConfig()).eval().requires_grad_(False)
    net = FastNetwork(model, dtype=torch.float32, device=CPU, backend="auto", products=products)
    assert isinstance(net._vote, SpreadVote) and net.value_width == 13 * C
    rows, maps = torch.randn(1, 256, 4, C), net.new_maps(1)
    net.vote(maps, as_candidates(net._vote, rows))
    found = maps.flatten(1, 2)[..., model.config.key_dim :]
    torch.testing.assert_close(found, vote_plain(rows, fold_vote(model.read)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_another_backend_gathers_rows(backend):
    vote = fused_vote(make_weights(), torch.float32, CPU, backend=backend)
    assert isinstance(vote, RowVote if backend == "reference" else SpreadVote)


@pytest.mark.parametrize(
    "name, bad, message",
    [
        ("values", torch.zeros(1, 7, C), r"must be float32 \(B, N, 832\)"),
        ("values", GOOD["values"].double(), r"must be float32 \(B, N, 832\)"),
        ("values", torch.zeros(1, 13 * C, 7).mT, ".* rows contiguous"),
        ("null_value", torch.zeros(C), "must be contiguous float32 of 832 elements"),
        ("query_part", torch.zeros(1, 8, C), "must be contiguous float32 of 576 elements"),
        ("indices", torch.zeros(1, 9, 33, dtype=torch.int32), r"must be \(B, M, K\), K 1..32"),
        ("indices", torch.zeros(2, 9, 4, dtype=torch.int32), r"must be \(B, M, K\)"),
        ("indices", torch.zeros(1, 9, 4), "must be contiguous int32"),
        ("indices", torch.full((1, 9, 4), 7, dtype=torch.int32), "must lie in -1..N-1"),
        ("indices", torch.full((1, 9, 4), -2, dtype=torch.int32), "must lie in -1..N-1"),
        ("scores", torch.ones(1, 9, 3), "must be contiguous float32 of 36 elements"),
        ("to_q", torch.zeros(8192).bfloat16(), "must be contiguous float32 of 8192 elements"),
        ("q_bias", torch.zeros(64), "must be contiguous float32 of 128 elements"),
        ("mix", torch.zeros(4096), "must be contiguous float32 of 8192 elements"),
        ("out", torch.zeros(4096), "must be contiguous float32 of 2048 elements"),
        ("out_bias", torch.zeros(48), "its length must be a multiple of 32"),
    ],
)
def test_bad_arguments(name, bad, message):
    torch.ops.dmv_fast.vote_float32_cpu(*GOOD.values(), 1e-5)
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        torch.ops.dmv_fast.vote_float32_cpu(*{**GOOD, name: bad}.values(), 1e-5)
