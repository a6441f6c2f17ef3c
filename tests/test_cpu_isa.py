"""Networks are loaded for the named instruction set; the vote takes whatever bfloat16 there is."""

from __future__ import annotations

import pytest
import torch

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.ops import available_backends
from dmv_fast.runtime.fold import fold_vote
from dmv_fast.runtime.load import load_network
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


@pytest.mark.parametrize("before", ["avx512_bf16", "avx2"])
def test_a_network_is_loaded_for_the_set_that_is_named_then(monkeypatch, checkpoint, before):
    """Not the one in memory for another set, whose weights and keys lie differently."""
    here(before)
    crops, box = torch.zeros(1, 256, 256, 3, dtype=torch.uint8), torch.tensor([[96.0, 90.0, 64.0, 70.0]])
    for isa in (before, "generic"):
        monkeypatch.setenv("DMV_FAST_CPU_ISA", isa)
        network = load_network(str(checkpoint), CPU, "float32", "auto")
        with torch.inference_mode():
            maps = network.look(crops)
            keys, values = network.remember(maps, *network.model.exact_maps(box))
            assert (keys.shape[-1], keys.dtype) == (network.key_width, network.key_dtype)
            assert network.predict(maps, keys, values, 4, 256).logits.isfinite().all()
