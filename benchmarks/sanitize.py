"""Every GPU kernel once, at small and crooked sizes, for a checker to watch.

    compute-sanitizer --tool memcheck python3 benchmarks/sanitize.py

Inputs are made on the CPU, so that next to nothing else runs on the GPU. On a CPU: what runs there.
"""

from __future__ import annotations

import argparse

import torch

from dmv_fast import ops


def check_retrieval(device: torch.device) -> None:
    """Each backend beside the reference: the K scores of every query."""
    for backend, problem in ops.available_backends(device.type).items():
        if backend == "reference" or problem is not None:
            print(f"{backend}: {problem or 'is what the others are compared with'}", flush=True)
            continue
        interpreted = backend == "triton" and device.type == "cpu"
        halves = (torch.float16,) if interpreted else (torch.bfloat16, torch.float16)
        cases = [(dtype, size) for dtype in halves for size in ((130, 700, 256, 4), (70, 300, 64, 32))]
        cases += [(dtype, (40, 300, 33, 4)) for dtype in (halves[0], torch.float32)]  # rows not aligned
        for dtype, (m, n, d, k) in cases:
            torch.manual_seed(0)
            query, keys = (torch.randn(2, m, d) / 8).to(dtype), torch.randn(2, n, d).to(dtype)
            valid = torch.tensor([n, n // 3], dtype=torch.int32)
            expected, _ = ops.retrieve(query, keys, k, valid=valid, backend="reference")
            inputs = query.to(device), keys.to(device)
            found, indices = ops.retrieve(*inputs, k, valid=valid.to(device), backend=backend)
            torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-3)
            values = torch.randn(2, n, 64).to(device, dtype)
            rest = torch.randn(64).to(device, dtype), torch.randn(2, m, 64).to(device, dtype)
            rows = ops.gather_candidates(values, *rest, indices, found, backend=backend)
            assert rows.cpu().isfinite().all()
        print(f"{backend}: right", flush=True)


def check_frame(device: torch.device) -> None:
    """The frame's own Triton kernels, by the network they belong to."""
    from dmv_fast.kernels.choose import choose
    from dmv_fast.kernels.crop import crop
    from dmv_fast.kernels.rows import join, project, with_length
    from dmv_fast.kernels.vote import make_vote

    from dmv_fast.model.pick import PickConfig, cosine_window
    from dmv_fast.model.retrieval import MemoryRead
    from dmv_fast.runtime.fold import fold_vote
    from dmv_fast.vision.boxes import anchor_grid

    torch.manual_seed(0)
    half, grid, a = torch.float16, 5, 5
    there = lambda *shape, dtype=half: torch.randn(*shape).to(device, dtype)  # noqa: E731
    out = torch.zeros(2, grid, grid, 96).to(device, half)
    bias = there(64, dtype=torch.float32)
    join(there(2, grid, grid, 32), there(2, grid, grid, 32), bias, out[..., :64], 1e-6)
    rows = out.flatten(1, 2)[..., :64]
    results = [out, with_length(rows, 12.0), project(rows, there(32, 64), bias[:32], 1e-5)]
    vote = make_vote(fold_vote(MemoryRead(64, 64, 64, 8).requires_grad_(False)), half, device)
    for k in (1, 3, 32):
        voted = torch.zeros(2, 7, 96).to(device, half)
        vote(there(2, 7, k, 64), voted[..., 32:])
        results.append(voted)
    pixels = torch.zeros(2, 40, 40, 8).to(device, half)
    windows = [[0, 30, 20, 5, 0, 35, 255], [1800, 20, 60, 0, 20, 90, 0]]
    patches = torch.randint(0, 255, (1800 + 3600,), dtype=torch.uint8).to(device)
    crop(patches, torch.tensor(windows, dtype=torch.int32).to(device), bias[:3].contiguous(), pixels)
    answer, scores = (torch.zeros(s).to(device) for s in ((2, 5), (2, a, grid, grid)))
    deltas = torch.zeros(2, a, 4, grid, grid).to(device)
    given = there(2, 5 * a, grid, grid)
    anchors, window = anchor_grid(grid, 256, (1 / 3, 1 / 2, 1, 2, 3), 64), cosine_window(a, grid)
    sizes = torch.tensor([[60.0, 50.0], [20.0, 90.0]]).to(device)
    logits, moves = given[:, :a], given[:, a:].unflatten(1, (a, 4))
    choose(logits, moves, anchors.to(device), window.to(device), sizes, PickConfig(), answer, scores, deltas)
    for result in (*results, pixels, answer, scores, deltas):
        assert result.cpu().isfinite().all()
    print("frame: finite", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    check_retrieval(device)
    if ops.available_backends(device.type)["triton"] is None:
        check_frame(device)


if __name__ == "__main__":
    main()
