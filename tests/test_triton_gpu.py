"""The Triton kernels on an NVIDIA GPU, at the sizes and tiles of the tracker; elsewhere these tests skip."""

from __future__ import annotations

import pytest
import torch
from reference_retrieval import assert_exact

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
pytestmark = [pytest.mark.gpu, NO_GPU]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def random_pair(batch, m, n, d, dtype, scale=3.0):
    """query and keys on the CPU whose logits have a standard deviation of about ``scale``."""
    torch.manual_seed(m + n + d)
    query = (torch.randn(batch, m, d) * scale / d**0.5).to(dtype)
    return query, torch.randn(batch, n, d).to(dtype)


def on_gpu(query, keys, k, valid=None):
    from dmv_fast.kernels.retrieve import retrieve

    valid = None if valid is None else valid.cuda()
    scores, indices = retrieve(query.cuda(), keys.cuda(), k, valid)
    return scores.cpu(), indices.cpu()


@HALF
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16, 31, 32])
def test_every_k(dtype, k):
    query, keys = random_pair(1, 256, 8192, 256, dtype)
    assert_exact(query, keys, k, *on_gpu(query, keys, k))


@HALF
@pytest.mark.parametrize("d", [64, 100, 128, 192, 256, 320, 512])
def test_every_depth(dtype, d):
    query, keys = random_pair(2, 130, 2100, d, dtype)
    assert_exact(query, keys, 4, *on_gpu(query, keys, 4))


@HALF
@pytest.mark.parametrize("k", [4, 32])
def test_tiles_of_a_large_memory(dtype, k):
    query, keys = random_pair(1, 1024, 9001, 256, dtype)
    assert_exact(query, keys, k, *on_gpu(query, keys, k))


def test_float32_is_float32():
    query, keys = random_pair(1, 70, 1500, 256, torch.float32)
    assert_exact(query, keys, 8, *on_gpu(query, keys, 8))


@HALF
def test_small_integers_give_exact_sets(dtype):
    query = torch.randint(-2, 3, (1, 256, 256)).to(dtype)
    keys = torch.randint(-1, 2, (1, 4000, 256)).to(dtype)
    _, indices = on_gpu(query, keys, 16)
    logits = torch.cat([torch.zeros(1, 256, 1), query.float() @ keys.float().mT], -1)
    got = logits.gather(-1, indices.long() + 1)
    assert torch.equal(got, logits.sort(dim=-1, descending=True).values[..., :16])


@HALF
def test_counts_are_read_on_the_device(dtype):
    """Each item its own count; what lies behind is poison."""
    valid = torch.tensor([0, 1, 3, 255, 256, 257, 5000, 8192], dtype=torch.int32)
    query, keys = random_pair(8, 40, 8192, 128, dtype)
    for item, count in enumerate(valid):
        keys[item, count:] = torch.nan
    scores, indices = on_gpu(query, keys, 4, valid)
    assert_exact(query, keys.nan_to_num(0.0), 4, scores, indices, valid)


@HALF
def test_same_bits_from_run_to_run(dtype):
    query, keys = random_pair(1, 256, 8192, 256, dtype)
    first = on_gpu(query, keys, 4)
    for _ in range(20):
        again = on_gpu(query, keys, 4)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@HALF
def test_a_graph_follows_its_inputs_without_waiting(dtype):
    """Captured once with an empty memory, replayed as it fills; nothing synchronises with the host."""
    from dmv_fast.kernels.gather import gather_candidates
    from dmv_fast.kernels.retrieve import retrieve

    query, keys = (t.cuda() for t in random_pair(1, 256, 8192, 256, dtype))
    shapes = (1, 8192, 128), (128,), (1, 256, 128)
    values, null_value, part = (torch.randn(shape).to(dtype).cuda() for shape in shapes)
    valid = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read():
        scores, indices = retrieve(query, keys, 4, valid)
        return scores, indices, gather_candidates(values, null_value, part, indices, scores)

    read()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = read()
    for count in (0, 1, 256, 300, 8192):
        valid.fill_(count)
        query.copy_(torch.roll(query, count, 1))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            eager = read()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for got, want in zip(captured, eager, strict=True):
            assert torch.equal(got, want)
        assert_exact(query.cpu(), keys.cpu(), 4, captured[0].cpu(), captured[1].cpu(), torch.tensor([count]))
