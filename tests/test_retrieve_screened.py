"""float32 retrieval that products of bytes screen the keys for: exact wherever those mislead."""

from __future__ import annotations

import pytest
import torch
from reference_retrieval import assert_exact, exact_logits, require
from threads import on_threads
from torch import Tensor
from torch.nn import functional as F

from dmv_fast import ops
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.ops.screened import pack_keys, retrieve_screened, screening_runs, turn, unpack_keys
from dmv_fast.runtime.network import FastNetwork


@pytest.fixture(autouse=True, params=["avx512", "amx"])
def _seed_and_require(monkeypatch, request):
    require(f"cpu:{request.param}")
    monkeypatch.setenv("DMV_FAST_CPU_ISA", request.param)
    if not screening_runs():
        pytest.skip("this processor has no AVX512_VNNI")
    torch.manual_seed(0)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def retrieve(query: Tensor, keys: Tensor, k: int, valid: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
    """From any number of keys, in a memory of whole blocks; what follows them is no number."""
    count = keys.shape[1]
    memory = pack_keys(F.pad(keys, (0, 0, 0, -count % 32), value=torch.nan))
    return retrieve_screened(query, memory, k, valid=count if valid is None else valid)


def shares(scores: Tensor) -> Tensor:
    """Scores among themselves: what retrieve_screened gives."""
    return scores / scores.sum(-1, keepdim=True)


def check(query: Tensor, keys: Tensor, k: int, valid: Tensor | int | None = None) -> Tensor:
    """The set is float32's, the scores are its softmax over that set; returns the indices."""
    scores, indices = retrieve(query, keys, k, valid)
    logits = exact_logits(query, keys, valid)
    exact = torch.exp(logits - logits.logsumexp(-1, keepdim=True)).gather(-1, indices.long() + 1)
    exact = exact.masked_fill(torch.arange(k) >= (logits > -torch.inf).sum(-1, keepdim=True), 0.0)
    assert (scores.sum(-1) - 1).abs().amax() < 1e-6
    assert_exact(query, keys, k, (scores * exact.sum(-1, keepdim=True)).float(), indices, valid)
    return indices


def test_bytes_leave_the_numbers_as_they_are():
    x = torch.randn(3, 64, 96).mT
    laid = pack_keys(x)
    assert torch.equal(unpack_keys(laid), x)
    assert laid.shape == (3, 96, 5 * 64 + 16)
    whole = laid.view(torch.int8).flatten(1)[:, : 32 * 64].view(3, 32, 64)
    numbers = laid.flatten(1)[:, 32 * 64 : 32 * 80].contiguous().view(torch.float32)
    scale, sums, off, length = numbers.view(3, 4, 32).unbind(1)
    rows = turn(x[:, :32])
    assert torch.equal(sums, 128.0 * whole.int().sum(-1))
    assert ((whole * scale[..., None] - rows).abs() <= 0.501 * scale[..., None]).all()
    assert ((whole * scale[..., None] - rows).norm(dim=-1) <= off * 1.00001).all()
    assert (off < 0.02 * length).all() and torch.allclose(length, rows.norm(dim=-1))


@pytest.mark.parametrize("depth", [32, 96, 256, 320, 512])
def test_turned_rows_have_the_products_they_had(depth):
    x = torch.randn(3, 7, depth, dtype=torch.float64)
    y = turn(x)
    torch.testing.assert_close(y @ y.mT, x @ x.mT)
    torch.testing.assert_close(turn(y), x)
    standing_out = torch.zeros(depth)
    standing_out[5] = 1
    assert turn(standing_out).abs().max() < 0.75


@pytest.mark.parametrize("k", [1, 4, 7, 32])
@pytest.mark.parametrize(
    "batch, m, n, depth", [(1, 70, 2000, 256), (3, 33, 333, 32), (2, 5, 1300, 512), (1, 1, 5, 96)]
)
def test_random_rows(batch, m, n, depth, k):
    query, keys = 12 * unit(batch, m, depth), unit(batch, n, depth)
    check(query, keys, k)
    check(query, keys, k, n // 3)
    check(query, keys, k, torch.randint(0, n + 1, (batch,), dtype=torch.int32))


@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize("distinct", [1, 3, 50])
def test_many_copies_nearly_alike(distinct, k):
    """So that hundreds of keys pass the screen: in some blocks a few, in others all of them."""
    originals = unit(1, distinct, 256)
    keys = originals[:, torch.randint(distinct, (1500,))] + 1e-4 * torch.randn(1, 1500, 256)
    check(12 * keys[:, :60] + 1e-3 * torch.randn(1, 60, 256), keys, k)


@pytest.mark.parametrize("k", [1, 4, 32])
def test_of_equals_the_smaller_index_comes_first(k):
    query, keys = torch.full((1, 3, 64), 0.25), torch.full((1, 777, 64), 0.5)
    assert torch.equal(check(query, keys, k), torch.arange(k, dtype=torch.int32).expand(1, 3, k))


@pytest.mark.parametrize("k", [1, 4, 32])
def test_rounding_at_its_worst(k):
    """The best keys' products, last to come, lose nearly all that rounding can take; those before gain."""
    depth, n, step = 128, 1600, 1 / 127
    keys = torch.full((1, n, depth), 2.51 * step)  # counts as 3
    keys[:, -k:] = 3.49 * step  # counts as 3 as well
    keys[:, -k:, ::2] = 2.49 * step  # and as 2
    keys[:, -k:, 0] = keys[:, :-k, 0] = 1.0
    query = torch.full((1, 40, depth), 0.01)
    query[..., 0] = 0.0
    query[..., 1] = 127 * 0.01
    bytes_of_keys = (keys * 127).round()
    rough, exact = query @ bytes_of_keys.mT * step, query @ keys.mT
    query, keys = turn(query), turn(keys)  # turned back when they are rounded
    assert (rough[..., -k:].amax(-1) < rough[..., :-k].amin(-1)).all()
    assert (exact[..., -k:].amin(-1) > exact[..., :-k].amax(-1)).all()
    assert (check(query, keys, k) >= n - k).all()


@pytest.mark.parametrize("flip", [False, True])
def test_each_key_better_or_worse_than_the_one_before(flip):
    keys = torch.linspace(0.9, 1.1, 2600).view(1, 2600, 1) * unit(1, 1, 64)
    query = 3 * keys[:, 1000:1001] + 0.01 * torch.randn(1, 35, 64)
    check(query, keys.flip(1) if flip else keys, 4)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
def test_rows_of_any_length(scale):
    """Squares that float32 does not hold, and keys a million times as long as others."""
    query, keys = unit(2, 40, 64) / scale, unit(2, 900, 64) * torch.logspace(-5, 1, 900)[:, None] * scale
    check(query, keys, 4)
    check(query, keys.flip(1), 4)
    query[0, 3], keys[:, 100:200] = 0, 0
    check(query, keys, 4)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_row_keeps_to_itself(poison):
    query, keys = unit(2, 40, 64), unit(2, 1200, 64)
    clean = retrieve(query, keys, 4)
    bad = query.clone()
    bad[0, 7, 3] = poison
    scores, indices = retrieve(bad, keys, 4)
    assert scores[0, 7].isnan().any() and (indices >= -1).all() and (indices < 1200).all()
    scores[0, 7], indices[0, 7] = clean[0][0, 7], clean[1][0, 7]
    assert torch.equal(scores, clean[0]) and torch.equal(indices, clean[1])

    bad = keys.clone()
    bad[1, 1190, 5] = poison
    scores, indices = retrieve(query, bad, 4)
    reached = query[1, :, 5] > 0 if poison == torch.inf else torch.ones(40, dtype=torch.bool)
    assert scores[1, reached].isnan().any(-1).all()
    assert torch.equal(scores[0], clean[0][0]) and torch.equal(indices[0], clean[1][0])
    expected = ops.retrieve(query, bad, 4, backend="cpu")[1]
    assert torch.equal(indices[1, ~reached], expected[1, ~reached])


@pytest.mark.parametrize("place, valid", [(639, 640), (255, 256), (0, 640)])
def test_a_key_of_minus_infinity_is_out(place, valid):
    """And nothing else is: the bytes of such a key are no numbers."""
    query, keys = torch.rand(1, 40, 64), unit(1, 640, 64)
    keys[0, place, 5] = -torch.inf
    expected = ops.retrieve(query, keys, 4, valid=valid, backend="cpu")
    scores, indices = retrieve(query, keys, 4, valid)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, shares(expected[0]), atol=0, rtol=1e-5)


@pytest.mark.parametrize("exponent", [17, 22, 30])
def test_numbers_whose_scales_overflow(exponent):
    """Query and key are long where the other is zero, so that the logits are small."""
    query, keys = torch.randn(1, 40, 64), unit(1, 640, 64)
    query[..., 0], keys[..., 0] = 10.0**exponent, 0
    query[..., 2], keys[..., 2] = 0, 10.0**exponent
    expected = ops.retrieve(query, keys, 4, backend="cpu")
    scores, indices = retrieve(query, keys, 4)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, shares(expected[0]), atol=0, rtol=1e-4)


@pytest.mark.parametrize("length", [(3e38, 1), (1e19, 1e20), (1e20, 1e19)])
def test_logits_that_overflow_are_not_passed_over(length):
    query, keys = length[0] * torch.ones(1, 3, 32), length[1] * torch.ones(1, 64, 32)
    assert retrieve(query, keys, 2)[0].isnan().any(-1).all()
    keys[:, 5:] = 0  # and a tile's other queries are as they were
    query[:, 1:] = 0.1 / length[1]
    scores, indices = retrieve(query, keys, 2)
    assert scores[0, 0].isnan().any() and (indices[0, 1:, 0] < 5).all() and scores[0, 1:].isfinite().all()


@pytest.mark.parametrize("logit", [1e8, 1e12, 1e30])
def test_logits_of_any_size_have_scores(logit):
    query, keys = torch.full((1, 3, 64), logit**0.5), unit(1, 640, 64) * logit**0.5
    scores, _ = retrieve(query, keys, 4)
    assert (scores[..., 0] == 1).all() and (scores[..., 1:] == 0).all()


def test_same_bits_however_the_work_is_split():
    """Neither threads, nor the tiles of a call, nor what lies behind `valid` change a bit."""
    query, keys = 12 * unit(3, 200, 64), unit(3, 1312, 64)
    keys[1] = keys[1, :1] + 1e-4 * torch.randn(1312, 64)
    laid = pack_keys(keys)
    scores, indices = retrieve_screened(query, laid, 8)
    for again in on_threads((1, 2, 5), lambda: retrieve_screened(query, laid, 8)):
        assert torch.equal(again[0], scores) and torch.equal(again[1], indices)
    part = retrieve_screened(query[1:2, 64:96], laid[1:2], 8)
    assert torch.equal(part[0], scores[1:2, 64:96]) and torch.equal(part[1], indices[1:2, 64:96])
    bank = torch.full((3, 1696, laid.shape[2]), 255, dtype=torch.uint8)
    bank[:, :1312] = laid
    for limit in (1312, torch.full((3,), 1312, dtype=torch.int32)):
        again = retrieve_screened(query, bank, 8, valid=limit)
        assert torch.equal(again[0], scores) and torch.equal(again[1], indices)


@pytest.mark.parametrize("depth", [64, 96, 256])
def test_same_bits_by_every_instruction_set(monkeypatch, depth):
    """Sums of bytes are whole numbers: it is all one how they are found."""
    query, keys = 12 * unit(1, 70, depth), unit(1, 2000, depth)
    answer = retrieve(query, keys, 4)
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "avx512")
    assert all(torch.equal(a, b) for a, b in zip(retrieve(query, keys, 4), answer, strict=True))


def test_a_memory_of_nothing():
    query, keys = unit(2, 40, 64), pack_keys(unit(2, 64, 64))
    for none in (0, torch.zeros(2, dtype=torch.int32)):
        scores, indices = retrieve_screened(query, keys, 4, valid=none)
        assert (indices == -1).all() and scores[..., 0].eq(1).all()
    assert (retrieve_screened(query, keys[:, :0], 4)[1] == -1).all()


def test_wrong_rows_are_refused():
    query, keys = unit(1, 4, 64), pack_keys(unit(1, 64, 64))
    for bad in (query[..., :48], query[0]):
        with pytest.raises(RuntimeError, match="query: must be float32 .B, M, D., D a multiple of 32"):
            retrieve_screened(bad, keys, 4)
    with pytest.raises(RuntimeError, match="keys: must be"):
        retrieve_screened(query, keys[..., :64], 4)
    with pytest.raises(RuntimeError, match="keys: must be .* N a multiple of 32"):
        retrieve_screened(query, keys[:, :40], 4)
    with pytest.raises(RuntimeError, match="valid: must lie in 0..N"):
        retrieve_screened(query, keys, 4, valid=torch.tensor([65], dtype=torch.int32))
    with pytest.raises(ValueError, match="keys: are torch.float32, they must be what pack_keys gives"):
        retrieve_screened(query, unit(1, 64, 64), 4)
    with pytest.raises(ValueError, match="rows: has shape .1, 33, 64., N and D must be multiples of 32"):
        pack_keys(unit(1, 33, 64))
    for bad in (-1, 65):
        with pytest.raises(ValueError, match=f"valid: is {bad}, it must be 0..64"):
            retrieve_screened(query, keys, 4, valid=bad)
    with pytest.raises(RuntimeError, match="valid: must be int32"):
        retrieve_screened(query, keys, 4, valid=torch.tensor([32], dtype=torch.int32).expand(9))
    with pytest.raises(RuntimeError, match="k: must be 1..32"):
        retrieve_screened(query, keys, 33)


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_other_instruction_sets_have_none(monkeypatch, isa):
    monkeypatch.setenv("DMV_FAST_CPU_ISA", isa)
    assert not screening_runs()
    with pytest.raises(RuntimeError, match="retrieve_screened_cpu: this processor has no AVX-512"):
        retrieve_screened(unit(1, 1, 32), pack_keys(unit(1, 32, 32)), 1)


@pytest.fixture(scope="module")
def model() -> DMV:
    return DMV(DMVConfig()).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "change, width", [({}, 1296), ({"backend": "reference"}, 256), ({"dtype": torch.bfloat16}, 256)]
)
def test_network_keeps_keys_for_it_in_float32(model, change, width):
    arguments = {"dtype": torch.float32, "device": torch.device("cpu"), "backend": "auto"} | change
    network = FastNetwork(model, **arguments)
    maps = network.new_maps(1).normal_()
    with torch.inference_mode():
        keys, _ = network.remember(maps, *model.exact_maps(torch.tensor([[96.0, 90.0, 64.0, 70.0]])))
        _, indices = network.match(maps, keys, 1, 256)
    assert keys.shape[-1] == network.key_width == width and keys.dtype == network.key_dtype
    own = torch.arange(256, dtype=torch.int32)
    assert torch.equal(indices.flatten(), own)
