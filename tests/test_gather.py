"""dmv_fast.ops.gather_candidates: every backend against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from reference_retrieval import BACKENDS, device_of, dtypes_of, instruction_set, require

from dmv_fast import ops


@pytest.fixture(autouse=True)
def _seed_and_require(request):
    torch.manual_seed(0)
    if "backend" in request.fixturenames:
        require(request.getfixturevalue("backend"))


def candidates(batch=2, m=9, n=50, width=40, k=5, dtype=torch.float32):
    """values, null_value, query_part, indices, scores; every row holds the null column once."""
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(batch * m)]).view(batch, m, k).int()
    indices[..., k // 2] = -1
    scores = torch.rand(batch, m, k) + 0.01
    tensors = torch.randn(batch, n, width), torch.randn(width), torch.randn(batch, m, width)
    return (*(t.to(dtype) for t in tensors), indices, scores)


def expected_rows(values, null_value, query_part, indices, scores):
    table = torch.cat([null_value.expand(values.shape[0], 1, -1), values], dim=1).double()
    batch, m, k = indices.shape
    selected = table[torch.arange(batch).view(-1, 1, 1), indices.long() + 1]
    weights = k * scores.double() / scores.double().sum(-1, keepdim=True)
    return weights.unsqueeze(-1) * selected + query_part.double().unsqueeze(2)


def gather(backend, *arguments):
    device = device_of(backend)
    with instruction_set(backend):
        on_device = (t.to(device) for t in arguments)
        return ops.gather_candidates(*on_device, backend=backend.partition(":")[0]).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 9, 50, 40, 5), (1, 70, 300, 128, 32), (3, 33, 20, 97, 4)]
)
def test_formula(backend, shape):
    batch, m, n, width, k = shape
    for dtype in dtypes_of(backend):
        arguments = candidates(batch, m, max(n, k), width, k, dtype)
        rows = gather(backend, *arguments)
        want = expected_rows(*arguments)
        assert rows.shape == want.shape and rows.dtype == dtype
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(rows.double(), want, rtol=4 * max(step, 1e-6), atol=4 * max(step, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_are_the_query_part(backend):
    values, null_value, query_part, indices, scores = candidates(k=4)
    scores[..., 3], indices[..., 3] = 0, -1
    rows = gather(backend, values, null_value, query_part, indices, scores)
    assert torch.equal(rows[:, :, 3], query_part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_is_read_in_place(backend):
    values, null_value, query_part, indices, scores = candidates()
    bank = torch.full((2, 80, 64), torch.nan)
    bank[:, :50, :40] = values
    rows = gather(backend, bank[:, :50, :40], null_value, query_part.mT.contiguous().mT, indices, scores)
    want = expected_rows(values, null_value, query_part, indices, scores)
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_numbers_pass_through(backend):
    for dtype in dtypes_of(backend):
        numbers = [torch.inf, -torch.inf, torch.nan, 65504, 6e-8, -1e-6, 0]
        values = torch.tensor(numbers, dtype=dtype).view(1, 1, 7)
        rows = gather(
            backend, values, values[0, 0], torch.zeros(1, 1, 7, dtype=dtype),
            torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1),
        )  # fmt: skip
        torch.testing.assert_close(rows[0, 0], values[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
def test_gradient(backend):
    device = device_of(backend)
    *tensors, scores = candidates()
    indices = tensors.pop()
    weight = torch.randn(2, 9, 5, 40)

    def gradients(function, dtype, device):
        leaves = [t.detach().to(device, dtype, copy=True).requires_grad_() for t in (*tensors, scores)]
        rows = function(*leaves[:3], indices.to(device), leaves[3])
        (rows * weight.to(device, dtype)).sum().backward()
        return [leaf.grad.cpu().double() for leaf in leaves]

    def exact(values, null_value, query_part, indices, scores):
        table = torch.cat([null_value.expand(2, 1, -1), values], dim=1)
        selected = table[torch.arange(2).view(-1, 1, 1), indices.long() + 1]
        return (5 * scores / scores.sum(-1, keepdim=True)).unsqueeze(-1) * selected + query_part.unsqueeze(2)

    ours = gradients(lambda *a: ops.gather_candidates(*a, backend=backend), torch.float32, device)
    for got, want in zip(ours, gradients(exact, torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_lies_across():
    """What a map (B, C, H, W) made of the rows gives back: its channels do not lie side by side."""
    *tensors, indices, scores = candidates()
    weight = torch.randn(2, 40, 9)

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in (*tensors, scores)]
        rows = function(ops.gather_candidates(*leaves[:3], indices, leaves[3]))
        (rows.mean(2).mT.contiguous() * weight).sum().backward()
        return [leaf.grad for leaf in leaves]

    for got, want in zip(gradients(lambda rows: rows), gradients(InRows.apply), strict=True):
        torch.testing.assert_close(got, want)


class InRows(torch.autograd.Function):
    """Nothing, but that the gradient is contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_opcheck_and_compile(backend):
    device = device_of(backend)
    arguments = [t.to(device) for t in candidates(n=12, m=3)]
    for place in (0, 1, 2, 4):
        arguments[place].requires_grad_()
    torch.library.opcheck(torch.ops.dmv_fast.gather_candidates.default, (*arguments, backend))

    def rows(*arguments):
        return ops.gather_candidates(*arguments, backend=backend)

    assert torch.equal(torch.compile(rows, fullgraph=True, backend="aot_eager")(*arguments), rows(*arguments))


@pytest.mark.parametrize(
    ("place", "tensor", "name", "needs"),
    [
        (0, torch.zeros(50, 40), "values", "(B, N, C)"),
        (1, torch.zeros(39), "null_value", "(40,)"),
        (2, torch.zeros(2, 8, 40), "query_part", "(2, 9, 40)"),
        (2, torch.zeros(2, 9, 40).half(), "query_part", "float32"),
        (3, torch.zeros(2, 9, 5), "indices", "int32"),
        (3, torch.zeros(9, 5).int(), "indices", "(B, M, K)"),
        (4, torch.zeros(2, 9, 4), "scores", "(2, 9, 5)"),
        (4, torch.zeros(2, 9, 5, device="meta"), "scores", "cpu"),
    ],
)
def test_bad_input_is_named(place, tensor, name, needs):
    arguments = list(candidates())
    arguments[place] = tensor
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        ops.gather_candidates(*arguments)
    assert needs in str(error.value)


def test_an_index_past_the_values_is_an_error():
    require("cpu")
    values, null_value, query_part, indices, scores = candidates()
    indices[0, 0, 0] = 50
    with pytest.raises(RuntimeError, match="indices: must lie in -1..N-1"):
        ops.gather_candidates(values, null_value, query_part, indices, scores, backend="cpu")
