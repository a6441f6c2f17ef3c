"""What the CUDA retrieval promises on hardware alone; test_retrieve.py runs there too, with backend cuda."""

from __future__ import annotations

import pytest
import torch
from reference_retrieval import assert_exact, require

from dmv_fast import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _seed_and_require():
    require("cuda")
    torch.manual_seed(0)


@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_trackers_size(dtype, k):
    query = (torch.randn(1, 256, 256) / 4).to(dtype)
    keys = torch.randn(1, 8192, 256).to(dtype)
    for valid in (None, torch.tensor([256], dtype=torch.int32), torch.tensor([5000], dtype=torch.int32)):
        count = None if valid is None else valid.cuda()
        results = [ops.retrieve(query.cuda(), keys.cuda(), k, valid=count, backend="cuda") for _ in range(3)]
        assert_exact(query, keys, k, *(result.cpu() for result in results[0]), valid)
        for scores, indices in results[1:]:
            assert torch.equal(scores, results[0][0]) and torch.equal(indices, results[0][1])


def test_a_graph_serves_every_length():
    query = torch.randn(2, 256, 256, device="cuda", dtype=torch.bfloat16) / 4
    keys = torch.randn(2, 4096, 256, device="cuda", dtype=torch.bfloat16)
    valid = torch.zeros(2, dtype=torch.int32, device="cuda")
    ops.retrieve(query, keys, 4, valid=valid, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, indices = ops.retrieve(query, keys, 4, valid=valid, backend="cuda")
    for counts in ([0, 1], [256, 4096], [3, 1000]):
        valid.copy_(torch.tensor(counts, dtype=torch.int32))
        query.normal_(std=0.25)
        keys.normal_()
        scores.fill_(torch.nan)
        graph.replay()
        assert_exact(query.cpu(), keys.cpu(), 4, scores.cpu(), indices.cpu(), valid.cpu())


def test_it_runs_on_the_current_stream():
    """Behind other work on that stream: the keys change just before, and nothing synchronises."""
    stream = torch.cuda.Stream()
    query = torch.randn(1, 64, 128, device="cuda", dtype=torch.float16)
    keys = torch.zeros(1, 2048, 128, device="cuda", dtype=torch.float16)
    new_keys = torch.randn(1, 2048, 128, device="cuda", dtype=torch.float16) / 8
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        keys.copy_(new_keys)
        scores, indices = ops.retrieve(query, keys, 8, backend="cuda")
    stream.synchronize()
    assert_exact(query.cpu(), new_keys.cpu(), 8, scores.cpu(), indices.cpu())
