"""What is done to rows between convolutions: the C++ operators against PyTorch, on a CPU."""

from __future__ import annotations

import pytest
import torch

from dmv_fast.ops.backends import cpu_operator_runs
from dmv_fast.runtime import rows

pytestmark = pytest.mark.skipif(
    not cpu_operator_runs("join_rows_cpu"), reason="the C++ extension is not loaded"
)


@pytest.mark.parametrize("unit_scale", [True, False])
@pytest.mark.parametrize(("half", "batch"), [(128, 1), (5, 3), (24, 2)])
def test_joined_rows(half, batch, unit_scale):
    """Into a part of wider rows, as the backbone does it: what lies beside stays."""
    torch.manual_seed(0)
    left, right = (torch.randn(batch, 9, 8, half) * 10 ** torch.randn(batch, 9, 8, 1) for _ in range(2))
    left[0, 0, 0], right[0, 0, 0] = 0, 0
    found, expected = (torch.full((batch, 9, 8, 2 * half + 3), 7.0) for _ in range(2))
    rows.join(left, right, None, found[..., : 2 * half], unit_scale=unit_scale)
    rows.join_plain(left, right, None, expected[..., : 2 * half], unit_scale=unit_scale)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("width", [256, 32, 7])
def test_rows_of_a_length(width):
    x = torch.randn(3, 70, width + 5)[..., :width] * 10 ** torch.randn(3, 70, 1)
    x[1, 2] = 0
    found = rows.with_length(x, 11.5)
    torch.testing.assert_close(found, rows.with_length_plain(x, 11.5))
    assert found.is_contiguous() and found[0].norm(dim=-1) == pytest.approx([11.5] * 70, rel=1e-5)


def test_wrong_tensors_are_refused():
    join = torch.ops.dmv_fast.join_rows_cpu.default
    left, out = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 8)
    for wrong, says in (
        ((left[0], left, out), "must be .B, H, W, D / 2."),
        ((left, left[..., :3], out), "must be .B, H, W, D / 2."),
        ((left, left, out[:, :1]), "must be .B, H, W, D / 2."),
        ((left.double(), left, out), "must be float32"),
        ((torch.zeros(1, 2, 4, 2).mT, left, out), "rows must be contiguous"),
        ((left, left, torch.zeros(1, 8, 2, 2).permute(0, 2, 3, 1)), "rows must be contiguous"),
        ((left, left, torch.zeros(1, 2, 3, 8)[:, :, :2]), "evenly spaced"),
    ):
        with pytest.raises(RuntimeError, match=says):
            join(*wrong, 1e-6)
    for wrong in (left, left[0].double(), torch.zeros(1, 4, 2).mT):
        with pytest.raises(RuntimeError, match="rows: must be"):
            torch.ops.dmv_fast.rows_with_length_cpu.default(wrong, 1.0)
