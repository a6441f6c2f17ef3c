"""The main figures under pytest-benchmark, to be compared from commit to commit:

    pip install -e '.[bench]'
    pytest benchmarks/ --benchmark-only --benchmark-autosave
    pytest benchmarks/ --benchmark-only --benchmark-compare
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason='needs pytest-benchmark: pip install "dmv-fast[bench]"')

from dmv_fast import ops
from dmv_fast.evaluation.speed import Bench, Setting, synthetic_clip


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(synthetic_clip(), Setting(weights="dmv18"), frames=2)


@pytest.mark.parametrize("k", [4, 32])
def test_retrieve(benchmark, k):
    """256 x 8192 x 256, bfloat16."""
    torch.manual_seed(0)
    query, keys = (torch.nn.functional.normalize(torch.randn(1, n, 256), dim=-1) for n in (256, 8192))
    scores, _ = benchmark(ops.retrieve, (12 * query).bfloat16(), keys.bfloat16(), k)
    assert scores.shape == (1, 256, k)


@pytest.mark.parametrize("k", [4, 32])
def test_vote(benchmark, bench, k):
    """A frame's 256 locations."""
    network = bench.frame_step(Setting(weights="dmv18", k=k, memory=1)).network
    config = network.model.config
    maps = torch.zeros(
        1, config.grid, config.grid, config.key_dim + config.value_dim, dtype=network.dtype,
        device=network.device,
    )  # fmt: skip
    keys, device = 8 * config.grid**2, network.device
    values = torch.randn(1, keys, network.value_width, dtype=network.dtype, device=device)
    scores = torch.rand(1, config.grid**2, k, device=device)
    indices = torch.randint(keys, scores.shape, dtype=torch.int32, device=device)
    candidates = network.gather(maps, values, scores, indices)
    with torch.inference_mode():
        benchmark(network.vote, maps, candidates)
    assert maps[..., config.key_dim :].isfinite().all()


@pytest.mark.parametrize("k", [4, 32])
def test_frame(benchmark, bench, k):
    """Image in to box out, 32 frames remembered."""
    run = bench.run_of(Setting(weights="dmv18", k=k))
    benchmark(run, 0)
