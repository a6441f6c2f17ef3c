"""dmv_fast.ops.retrieve: every backend against float64 brute force, and what the operator promises beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_retrieval import (
    BACKENDS,
    CPU_ISAS,
    assert_exact,
    device_of,
    dtypes_of,
    exact_logits,
    instruction_set,
    require,
    retrieve,
)
from threads import on_threads

from dmv_fast import ops
from dmv_fast.ops import backends

every_backend = pytest.mark.parametrize("backend", BACKENDS)
cpu_backend = pytest.mark.parametrize("backend", [f"cpu:{isa}" for isa in CPU_ISAS])


@pytest.fixture(autouse=True)
def _seed_and_require(request):
    torch.manual_seed(0)
    if "backend" in request.fixturenames:
        require(request.getfixturevalue("backend"))


def random_pair(batch, m, n, depth, dtype, scale=1.0):
    """query and keys whose logits have a standard deviation of about ``scale``."""
    query = (torch.randn(batch, m, depth) * scale / depth**0.5).to(dtype)
    return query, torch.randn(batch, n, depth).to(dtype)


@every_backend
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_sizes(backend, data):
    draw = data.draw
    dtype = draw(st.sampled_from(dtypes_of(backend)))
    m, n = draw(st.integers(1, 70)), draw(st.integers(0, 1500))
    depth, k = draw(st.sampled_from([64, 65, 96, 128, 200, 256, 384, 512])), draw(st.integers(1, 32))
    batch, scale = draw(st.integers(1, 3)), draw(st.sampled_from([0.1, 1.0, 8.0]))
    valid = draw(st.none() | st.integers(0, n) | st.lists(st.integers(0, n), min_size=batch, max_size=batch))
    valid = torch.tensor(valid, dtype=torch.int32) if isinstance(valid, list) else valid
    torch.manual_seed(draw(st.integers(0, 2**20)))
    query, keys = random_pair(batch, m, n, depth, dtype, scale)
    assert_exact(query, keys, k, *retrieve(backend, query, keys, k, valid), valid)


@every_backend
@pytest.mark.parametrize(
    ("m", "n", "depth", "k"),
    [
        (1, 1, 64, 1),
        (1, 5, 512, 32),
        (3, 513, 256, 1),
        (33, 2047, 128, 32),
        (40, 3000, 64, 4),
        (31, 1100, 33, 17),
    ],  # fmt: skip
)
def test_odd_sizes(backend, m, n, depth, k):
    for dtype in dtypes_of(backend):
        query, keys = random_pair(2, m, n, depth, dtype)
        assert_exact(query, keys, k, *retrieve(backend, query, keys, k))


@every_backend
@pytest.mark.parametrize("k", [1, 4, 32])
def test_fewer_keys_than_k(backend, k):
    query, keys = random_pair(1, 5, 600, 64, torch.float32)
    for valid in {0, 1, k - 1, k, 599, 600}:
        assert_exact(query, keys, k, *retrieve(backend, query, keys, k, valid), valid)
        counts = torch.tensor([valid], dtype=torch.int32)
        assert_exact(query, keys, k, *retrieve(backend, query, keys, k, counts), counts)


@every_backend
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**20), n=st.integers(1, 900), k=st.sampled_from([1, 3, 4, 16, 31, 32]))
def test_small_integers_give_exact_sets(backend, seed, n, k):
    """Products of small integers are exact everywhere: ties are ties, values have to agree to the bit."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (1, 9, 64), generator=generator)
    keys = torch.randint(-1, 2, (1, n, 64), generator=generator)
    dtype = dtypes_of(backend)[seed % len(dtypes_of(backend))]
    scores, indices = retrieve(backend, query.to(dtype), keys.to(dtype), k)
    logits = exact_logits(query, keys)
    order = logits.sort(dim=-1, descending=True, stable=True)
    found = min(k, n + 1)
    assert torch.equal(logits.gather(-1, indices[..., :found].long() + 1), order.values[..., :found])
    if backend.startswith("cpu"):  # this backend's own promise: of equals the smaller index comes first
        assert torch.equal(indices[..., :found].long(), order.indices[..., :found] - 1)


@every_backend
@pytest.mark.parametrize("k", [1, 4, 32])
def test_all_keys_equal(backend, k):
    query, key = torch.full((1, 3, 64), 0.25), torch.full((1, 1, 64), 0.5)
    keys = key.expand(1, 777, 64).contiguous()
    scores, indices = retrieve(backend, query, keys, k)
    assert_exact(query, keys, k, scores, indices)
    if backend.startswith("cpu"):
        assert torch.equal(indices, torch.arange(k, dtype=torch.int32).expand(1, 3, k))


@every_backend
def test_logits_that_exp_cannot_hold(backend):
    for dtype in dtypes_of(backend):
        query, keys = random_pair(1, 8, 900, 64, dtype)
        for factor in (2.0**11, 2.0**-11):
            scaled = query * factor
            assert_exact(scaled, keys, 4, *retrieve(backend, scaled, keys, 4))


@every_backend
@pytest.mark.parametrize("k", [1, 4, 32])
def test_every_key_is_better_than_all_before(backend, k):
    """The worst order for a running list: whatever room there is for candidates overflows again and again."""
    for dtype in dtypes_of(backend):
        query = (torch.rand(1, 35, 64) + 0.5).to(dtype)
        keys = (torch.linspace(0.1, 0.8, 2600).view(1, 2600, 1) * torch.ones(64)).to(dtype)
        for order in (keys, keys.flip(1)):
            assert_exact(query, order, k, *retrieve(backend, query, order, k))


@every_backend
def test_null_wins_everywhere_or_nowhere(backend):
    query, keys = torch.rand(1, 6, 64) + 0.5, torch.rand(1, 600, 64) + 0.5
    scores, indices = retrieve(backend, query, -keys, 4)
    assert (indices[..., 0] == -1).all() and (scores[..., 0] > 0.99).all()
    assert_exact(query, -keys, 4, scores, indices)
    scores, indices = retrieve(backend, query, keys, 4)
    assert (indices >= 0).all()
    assert_exact(query, keys, 4, scores, indices)


@every_backend
def test_every_output_is_written(backend):
    if backend == "reference":
        pytest.skip("it hands out no tensor that it allocates empty")
    query, keys = random_pair(2, 37, 70, 64, torch.float32)
    was = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # new tensors start as NaN or the largest integer
    try:
        assert torch.empty(1).isnan().all()
        for valid in (None, 0, 3):
            assert_exact(query, keys, 5, *retrieve(backend, query, keys, 5, valid), valid)
    finally:
        torch.set_deterministic_debug_mode(was)


@every_backend
def test_a_bank_is_read_in_place(backend):
    """Rows of a larger, batch-strided bank; what lies past the valid ones never matters."""
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        query, keys = random_pair(2, 33, 500, 96, dtype)
        bank = torch.full((2, 700, 128), torch.nan, dtype=dtype)
        bank[:, :500, :96] = keys
        bank = bank.to(device)[:, :, :96]
        wide = torch.full((2, 40, 96), torch.nan, dtype=dtype).to(device)
        wide[:, :33] = query.to(device)
        valid = torch.tensor([500, 499], dtype=torch.int32, device=device)
        with instruction_set(backend):
            name = backend.partition(":")[0]
            for limit in (500, valid):
                scores, indices = ops.retrieve(wide[:, :33], bank, 6, valid=limit, backend=name)
                assert_exact(query, keys, 6, scores.cpu(), indices.cpu(), torch.as_tensor(limit).cpu())
            mapped = query.to(device).mT.contiguous().mT  # channels first
            scores, indices = ops.retrieve(mapped, bank, 6, valid=500, backend=name)
        assert_exact(query, keys, 6, scores.cpu(), indices.cpu())


@every_backend
def test_counts_of_any_stride(backend):
    query, keys = random_pair(2, 4, 40, 32, torch.float32)
    counts = torch.tensor([5, 40, 7, 40], dtype=torch.int32, device=device_of(backend))[::2]
    assert_exact(query, keys, 4, *retrieve(backend, query, keys, 4, counts), counts.cpu())


@every_backend
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_row_keeps_to_itself(backend, poison):
    for n in (90, 1200):
        query, keys = random_pair(2, 40, n, 64, torch.float32)
        clean_scores, clean_indices = retrieve(backend, query, keys, 4)
        bad = query.clone()
        bad[0, 7, 3] = poison
        scores, indices = retrieve(backend, bad, keys, 4)
        assert scores[0, 7].isnan().any()
        assert (indices >= -1).all() and (indices < n).all()
        scores[0, 7], indices[0, 7] = clean_scores[0, 7], clean_indices[0, 7]
        assert torch.equal(scores, clean_scores) and torch.equal(indices, clean_indices)

        bad = keys.clone()
        bad[1, n - 3, 5] = torch.nan
        scores, indices = retrieve(backend, query, bad, 4)
        assert scores[1].isnan().any(-1).all()
        assert torch.equal(scores[0], clean_scores[0]) and torch.equal(indices[0], clean_indices[0])


@every_backend
def test_order_of_the_keys_does_not_matter(backend):
    query, keys = random_pair(1, 20, 1111, 64, torch.float32, scale=4.0)
    order = torch.randperm(1111)
    scores, indices = retrieve(backend, query, keys, 8)
    permuted_scores, permuted = retrieve(backend, query, keys[:, order], 8)
    back = torch.where(permuted < 0, -1, order[permuted.clamp(min=0).long()].int())
    assert torch.equal(back, indices)
    torch.testing.assert_close(permuted_scores, scores, rtol=1e-5, atol=1e-9)


@every_backend
def test_same_bits_from_run_to_run(backend):
    for dtype in dtypes_of(backend):
        query, keys = random_pair(2, 65, 1300, 128, dtype)
        scores, indices = retrieve(backend, query, keys, 32)
        for _ in range(3):
            again = retrieve(backend, query, keys, 32)
            assert torch.equal(again[0], scores) and torch.equal(again[1], indices)


@cpu_backend
def test_same_bits_however_the_work_is_split(backend):
    """Neither threads, nor the other queries of a call, nor the capacity behind `valid` change a bit."""
    query, keys = random_pair(3, 200, 1300, 64, torch.bfloat16)
    scores, indices = retrieve(backend, query, keys, 8)
    for again in on_threads((1, 2, 5), lambda: retrieve(backend, query, keys, 8)):
        assert torch.equal(again[0], scores) and torch.equal(again[1], indices)
    part = retrieve(backend, query[1:2, 70:71], keys[1:2], 8)
    assert torch.equal(part[0], scores[1:2, 70:71]) and torch.equal(part[1], indices[1:2, 70:71])
    capacity = torch.cat([keys, torch.full_like(keys, torch.nan)], dim=1)
    valid = torch.full((3,), 1300, dtype=torch.int32)
    for limit in (1300, valid):
        again = retrieve(backend, query, capacity, 8, limit)
        assert torch.equal(again[0], scores) and torch.equal(again[1], indices)


def gradients(query, keys, scores_of, weight, renormalise):
    query, keys = query.detach().requires_grad_(), keys.detach().requires_grad_()
    scores = scores_of(query, keys)
    if renormalise:
        scores = scores / scores.sum(-1, keepdim=True)
    (scores * weight).sum().backward()
    return query.grad, keys.grad


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize(
    ("n", "k", "renormalise"),
    [(300, 4, True), (300, 32, True), (5, 6, False), (3, 8, False), (1, 1, True)],
)
def test_gradient(backend, n, k, renormalise):
    """Exact for scores renormalised over the selected columns, and wherever every column is selected."""
    device = device_of(backend)
    query, keys = random_pair(2, 7, n, 64, torch.float32, scale=2.0)
    valid = torch.tensor([n, max(n - 1, 0)], dtype=torch.int32)
    _, indices = retrieve(backend, query, keys, k, valid)
    weight = torch.randn(2, 7, k)

    def exact(query, keys):
        columns = torch.arange(k) < (valid.view(-1, 1, 1) + 1)  # what lies behind is padding
        scores = torch.softmax(exact_logits(query, keys, valid), -1)
        return scores.gather(-1, indices.long() + 1) * columns

    expected = gradients(query.double(), keys.double(), exact, weight, renormalise)
    ours = gradients(
        query.to(device), keys.to(device),
        lambda q, m: ops.retrieve(q, m, k, valid=valid.to(device), backend=backend)[0],
        weight.to(device), renormalise,
    )  # fmt: skip
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)


def test_gradient_keeps_half_precision():
    query, keys = random_pair(1, 7, 50, 64, torch.bfloat16)
    got = gradients(query, keys, lambda q, m: ops.retrieve(q, m, 4)[0], torch.ones(1, 7, 4), False)
    assert got[0].dtype == got[1].dtype == torch.bfloat16 and got[0].abs().sum() > 0


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_opcheck(backend):
    device = device_of(backend)
    query, keys = (t.to(device).requires_grad_() for t in random_pair(2, 5, 20, 64, torch.float32))
    valid = torch.tensor([20, 9], dtype=torch.int32, device=device)
    operator = torch.ops.dmv_fast.retrieve.default
    torch.library.opcheck(operator, (query, keys, 4, valid, backend))
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    half = query.half().mT.contiguous().mT  # channels first
    torch.library.opcheck(operator, (half, keys.half(), 4, None, backend), test_utils=quick)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_compiles_whole(backend):
    device = device_of(backend)
    query, keys = (t.to(device) for t in random_pair(1, 5, 50, 64, torch.float32))

    def read(query, keys, valid):
        return ops.retrieve(query * 2, keys, 3, valid=valid, backend=backend)

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for valid in (None, 17, torch.tensor([17], dtype=torch.int32, device=device)):
        for got, want in zip(compiled(query, keys, valid), read(query, keys, valid), strict=True):
            assert torch.equal(got, want)


GOOD = {
    "query": torch.zeros(2, 3, 64),
    "keys": torch.zeros(2, 5, 64),
    "k": 2,
    "valid": None,
    "backend": "auto",
}


@pytest.mark.parametrize(
    ("change", "name", "has", "needs"),
    [
        ({"query": torch.zeros(3, 64)}, "query", "(3, 64)", "(B, M, D)"),
        ({"keys": torch.zeros(2, 1, 5, 64)}, "keys", "(2, 1, 5, 64)", "(B, N, D)"),
        ({"keys": torch.zeros(1, 5, 64)}, "keys", "(1, 5, 64)", "(2, N, 64)"),
        ({"keys": torch.zeros(2, 5, 32)}, "keys", "(2, 5, 32)", "(2, N, 64)"),
        ({"keys": torch.zeros(2, 5, 64).half()}, "keys", "float16", "float32"),
        ({"query": torch.zeros(2, 3, 64).double()}, "query", "float64", "float32, bfloat16 or float16"),
        ({"keys": torch.zeros(2, 5, 64, device="meta")}, "keys", "meta", "cpu"),
        ({"query": torch.zeros(2, 3, 513), "keys": torch.zeros(2, 5, 513)}, "query", "513", "1..512"),
        ({"query": np.zeros((2, 3, 64))}, "query", "ndarray", "Tensor"),
        ({"k": 2.5}, "k", "2.5", "whole number"),
        ({"valid": 3.0}, "valid", "3.0", "whole number"),
        ({"k": 0}, "k", "0", "1..32"),
        ({"k": 33}, "k", "33", "1..32"),
        ({"valid": -1}, "valid", "-1", "0..5"),
        ({"valid": 6}, "valid", "6", "0..5"),
        ({"valid": torch.tensor([6, 0], dtype=torch.int32)}, "valid", "[6, 0]", "0..5"),
        ({"valid": torch.tensor([0, -1], dtype=torch.int32)}, "valid", "[0, -1]", "0..5"),
        ({"valid": torch.tensor([1, 1])}, "valid", "int64", "int32"),
        ({"valid": torch.tensor([1], dtype=torch.int32)}, "valid", "(1,)", "(2,)"),
        ({"backend": "cuda"}, "backend", "'cuda'", "CUDA devices only"),
        ({"backend": "magic"}, "backend", "'magic'", "reference"),
    ],
)
def test_bad_input_is_named(change, name, has, needs):
    arguments = GOOD | change
    with pytest.raises(ValueError, match=rf"^{name}\b") as error:
        ops.retrieve(
            arguments["query"], arguments["keys"], arguments["k"],
            valid=arguments["valid"], backend=arguments["backend"],
        )  # fmt: skip
    assert has in str(error.value) and needs in str(error.value)


def test_numpy_counts_are_numbers():
    query, keys = random_pair(1, 3, 9, 64, torch.float32)
    for got, want in zip(
        ops.retrieve(query, keys, np.int64(2), valid=np.int32(5)), ops.retrieve(query, keys, 2, valid=5),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)


@every_backend
def test_keys_of_minus_infinity_are_as_none_or_nan(backend):
    query = torch.full((1, 2, 64), 0.01)
    query[0, 1, 5] = -torch.inf
    scores, indices = retrieve(backend, query, torch.ones(1, 70, 64), 3)
    assert scores[0, 1].isnan().any() or scores[0, 1].tolist() == [1, 0, 0]
    assert (indices[0, 1] == -1).all() or scores[0, 1].isnan().any()
    assert scores[0, 0].isfinite().all() and (indices[0, 0] >= 0).all()


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    require("cpu")
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="DMV_FAST_CPU_ISA: mmx is unknown"):
        ops.retrieve(GOOD["query"], GOOD["keys"], 2, backend="cpu")


def test_without_the_extension_one_warning_says_why(monkeypatch):
    """The reference takes over; the reason is in the warning and in what `doctor` shows."""

    def forget():
        backends.available_backends.cache_clear()
        backends.fastest_backend.cache_clear()

    monkeypatch.setattr(backends, "_extension_problem", lambda: "dmv_fast._C is missing")
    forget()
    try:
        assert "missing" in ops.available_backends("cpu")["cpu"]
        with pytest.warns(RuntimeWarning, match="dmv_fast._C is missing") as caught:
            for _ in range(3):
                ops.retrieve(GOOD["query"], GOOD["keys"], 2)
        assert len(caught) == 1
        with pytest.raises(ValueError, match="^backend 'cpu' cannot be used"):
            ops.retrieve(GOOD["query"], GOOD["keys"], 2, backend="cpu")
    finally:
        forget()
