"""The Triton kernels of the frame, vote and crop: under the interpreter, and compiled for every chip.

Triton reads TRITON_INTERPRET when a kernel is defined, so the first half runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448, 120: 101376}  # bytes a block may have

if os.environ.get("TRITON_INTERPRET") != "1":
    from dmv_fast.kernels.crop import BLOCK, crop_kernel
    from dmv_fast.kernels.vote import vote_constants, vote_kernel, vote_warps
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def test_under_the_interpreter():
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr

    def compile_for(kernel, arch: int, constants: dict, warps: int, types: dict[str, str]):
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp16" if "_ptr" in name else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants, {})
        options = {"num_warps": warps, "enable_fp_fusion": True}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    @pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
    @pytest.mark.parametrize("k", [1, 4, 32])
    def test_vote_compiles(arch, k):
        constants = vote_constants(k, 8, 64, 256, 256)
        types = dict.fromkeys(("q_bias_ptr", "mix_bias_ptr", "out_bias_ptr"), "*fp32") | {"epsilon": "fp32"}
        compiled = compile_for(vote_kernel, arch, constants, vote_warps(constants), types)
        assert compiled.metadata.shared <= SHARED_LIMIT[arch]
        assert "mma" in compiled.asm["ptx"]

    @pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
    def test_crop_compiles(arch):
        constants = {"SIZE": 256, "BLOCK": BLOCK}
        types = {"bytes_ptr": "*u8", "windows_ptr": "*i32", "mean_ptr": "*fp32"}
        assert compile_for(crop_kernel, arch, constants, 4, types).metadata.shared <= SHARED_LIMIT[arch]

else:
    import dmv_fast.kernels.crop as crop_module
    from dmv_fast.kernels.crop import crop
    from dmv_fast.kernels.vote import make_vote

    from dmv_fast.model.dmv import DMV, DMVConfig
    from dmv_fast.model.pick import PickConfig
    from dmv_fast.model.voting import VotingNet
    from dmv_fast.runtime import cuda
    from dmv_fast.runtime.fold import fold_vote
    from dmv_fast.runtime.frame import FrameStep
    from dmv_fast.runtime.network import FastNetwork
    from dmv_fast.vision.crop import Window, cut, mean_colour, search_window

    versions = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, np)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot run loops with NumPy 2.4", allow_module_level=True)

    CPU = torch.device("cpu")

    @pytest.fixture(scope="module")
    def read():
        """A memory read with a vote in which every weight and bias matters."""
        from dmv_fast.model.retrieval import MemoryRead

        torch.manual_seed(0)
        read = MemoryRead(32, 96, 64, 8).requires_grad_(False)
        for name, tensor in read.voting.named_parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
            tensor.mul_(3 if name.startswith("to_q") else 1)
        return read

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 17, 32])
    def test_vote(read, k):
        rows = torch.randn(1, 7, k, 64)
        found = make_vote(fold_vote(read), torch.float32, CPU)(rows)
        torch.testing.assert_close(found, read.voting(rows), atol=1e-5, rtol=1e-5)

    def test_vote_in_half(read):
        rows = torch.randn(2, 5, 6, 64).half()
        found = make_vote(fold_vote(read), torch.float16, CPU)(rows)
        torch.testing.assert_close(found.float(), read.voting(rows.float()), atol=5e-3, rtol=5e-3)

    def test_vote_keeps_locations_apart(read):
        vote = make_vote(fold_vote(read), torch.float32, CPU)
        rows = torch.randn(1, 9, 4, 64)
        assert isinstance(read.voting, VotingNet)
        before = vote(rows)
        rows[0, 5] = torch.randn(4, 64)
        assert (vote(rows) != before).any(-1)[0].nonzero().flatten().tolist() == [5]

    @pytest.mark.parametrize(
        ("window", "most", "shrinks"),
        [
            (Window(10, 5, 20), 1, False),  # inside, larger afterwards: OpenCV rounds its shares to 1/2048
            (Window(-9, 12, 31), 1, False),  # over an edge
            (Window(-14, -20, 32), 0, False),  # as it is
            (Window(-3, 2, 75), 0, True),  # smaller afterwards, by no whole number
            (Window(-50, -40, 170), 0, True),  # all of the frame
            (Window(200, 90, 40), 0, True),  # nothing of it
        ],
    )
    def test_crop_is_the_one_on_the_cpu(window, most, shrinks):
        image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        left, right = (min(max(x, 0), 80) for x in (window.x0, window.x0 + window.side))
        top, bottom = (min(max(y, 0), 60) for y in (window.y0, window.y0 + window.side))
        patch = torch.from_numpy(image[top:bottom, left:right].flatten())
        fill = sum(int(c) << (8 * i) for i, c in enumerate(mean_colour(image).round()))
        fields = [0, right - left, bottom - top, left - window.x0, top - window.y0, window.side, fill]
        out, size = torch.empty(2, 32, 32, 3), 32
        mean = torch.tensor([100.0, 110.0, 120.0])
        assert (window.side > size) == shrinks
        windows = torch.tensor([fields] * 2, dtype=torch.int32)
        crop(patch if len(patch) else torch.zeros(1, dtype=torch.uint8), windows, mean, out)
        expected = torch.from_numpy(cut(image, window, size).astype(np.float32)) - mean
        assert (out - expected).abs().max() <= most

    @pytest.fixture
    def no_gpu(monkeypatch):
        """CudaFrameStep on the CPU: what would be replayed is run again, into the same tensors."""

        def record(work, device):
            cells = [cell.cell_contents for cell in work.__closure__]
            step = next(c for c in cells if isinstance(c, cuda.CudaFrameStep))
            work()
            static = step._seen

            def replay():
                with torch.inference_mode():
                    work()
                    for old, new in zip(static, step._seen, strict=True):
                        old.copy_(new)

            return replay

        class Stream:
            def synchronize(self): ...

        monkeypatch.setattr(cuda, "record", record)
        monkeypatch.setattr(cuda.torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(crop_module, "BLOCK", 256 * 256)

    def test_cuda_step_is_the_plain_step(no_gpu):
        """The same boxes and memories: uploads, places and slots find their way."""
        torch.manual_seed(0)
        model = DMV(DMVConfig()).eval().requires_grad_(False)
        network = FastNetwork(model, dtype=torch.float32, device=CPU, backend="reference")
        rng = np.random.default_rng(0)
        image, after = (rng.integers(0, 255, (240, 300, 3), dtype=np.uint8) for _ in range(2))
        boxes = [(60.0, 50.0, 80.0, 70.0), (200.0, 150.0, 90.0, 100.0)]
        windows = [search_window(box) for box in boxes]  # one inside, one over the edge; both shrink
        sizes = np.array([w.to_crop(b)[2:] for w, b in zip(windows, boxes, strict=True)])
        steps = [
            kind(network, k=2, capacity=3, pick=PickConfig(), targets=2)
            for kind in (FrameStep, cuda.CudaFrameStep)
        ]
        answers = []
        for step in steps:
            for place, box in enumerate(boxes):
                step.start(place, image, windows[place], box)
            first = step.step(after, windows, sizes)
            assert step.write(1, 1) and step.write(0, 1) and step.write(1, 2)
            answers.append(np.concatenate([first, step.step(image, windows, sizes)]))
        np.testing.assert_allclose(answers[1], answers[0], atol=1e-3)
        plain, cuda_memory = (step.memory for step in steps)
        assert plain.valid.tolist() == cuda_memory.valid.tolist() == [512, 768]
        torch.testing.assert_close(cuda_memory.keys, plain.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cuda_memory.values, plain.values, atol=1e-4, rtol=1e-4)
        other = steps[1].clone()
        assert other._inbox.data_ptr() != steps[1]._inbox.data_ptr() and not other._recorded
