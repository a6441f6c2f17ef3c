"""The vote runs on whatever bfloat16 instructions there are, whichever set the retrieval prefers."""

from __future__ import annotations

import pytest
import torch

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.ops import available_backends
from dmv_fast.runtime.fold import fold_vote
from dmv_fast.runtime.vote import fused_vote, vote_plain

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    available_backends("cpu")["cpu"] is not None, reason="dmv_fast._C is not built here"
)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return fold_vote(DMV(DMVConfig()).read)


def here(isa: str) -> None:
    if isa not in torch.ops.dmv_fast.cpu_isas().split():
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16"])
@pytest.mark.parametrize("k", [1, 4, 7, 32])
def test_vote_of_each_instruction_set(monkeypatch, weights, isa, k):
    here(isa)
    monkeypatch.setenv("DMV_FAST_CPU_ISA", isa)
    assert torch.ops.dmv_fast.vote_cpu_runs()
    torch.manual_seed(0)
    rows, out = torch.randn(1, 37, k, 64).bfloat16(), torch.empty(1, 37, 256, dtype=torch.bfloat16)
    fused_vote(weights, torch.bfloat16, CPU)(rows, out)
    expected = vote_plain(rows.float(), weights)
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_a_named_set_without_bfloat16_has_no_vote(monkeypatch, isa):
    here(isa)
    monkeypatch.setenv("DMV_FAST_CPU_ISA", isa)
    assert not torch.ops.dmv_fast.vote_cpu_runs()


def test_vote_does_not_depend_on_what_the_retrieval_prefers(monkeypatch):
    """An Intel processor with avx512_bf16 but no amx prefers avx512 for the retrieval."""
    monkeypatch.delenv("DMV_FAST_CPU_ISA", raising=False)
    isas = torch.ops.dmv_fast.cpu_isas().split()
    assert torch.ops.dmv_fast.vote_cpu_runs() == bool({"amx", "avx512_bf16"} & set(isas))
