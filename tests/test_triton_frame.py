"""Triton kernels of the frame and CudaFrameStep on them: interpreted on the CPU, compiled for every chip."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from interpreted import INTERPRETED, run_again, skip_without_loops

triton = pytest.importorskip("triton")

SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448, 120: 101376}  # bytes a block may have

HALVES = ("*fp16", "*bf16")

if not INTERPRETED:
    from dmv_fast.kernels.choose import choose_constants, choose_kernel, choose_warps
    from dmv_fast.kernels.crop import BLOCK, crop_kernel
    from dmv_fast.kernels.rows import join_kernel, project_kernel, with_length_kernel
    from dmv_fast.kernels.vote import vote_constants, vote_kernel, vote_warps
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @pytest.mark.slow
    def test_under_the_interpreter():
        run_again(__file__)

    def compile_for(kernel, arch: int, constants: dict, warps: int, types: dict[str, str], half: str):
        """Fit for the chip, or it fails."""
        signature = {
            name: "constexpr" if name in constants else types.get(name, half if "_ptr" in name else "i32")
            for name in kernel.arg_names
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if "_ptr" in name}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert compiled.metadata.shared <= SHARED_LIMIT[arch]
        return compiled

    every_chip = pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))

    @every_chip
    @pytest.mark.parametrize("k", [1, 4, 32])
    @pytest.mark.parametrize("locations", [256, 16 * 1024])
    def test_vote_compiles(arch, k, locations):
        constants = vote_constants(k, 8, 64, 256, locations)
        types = dict.fromkeys(("q_bias_ptr", "mix_bias_ptr", "out_bias_ptr"), "*fp32") | {"epsilon": "fp32"}
        for half in HALVES[: 2 if arch == 90 else 1]:
            compiled = compile_for(vote_kernel, arch, constants, vote_warps(constants), types, half)
            assert "mma" in compiled.asm["ptx"]

    @every_chip
    def test_crop_compiles(arch):
        constants = {"SIZE": 256, "CHANNELS": 8, "BLOCK": BLOCK}
        types = {"bytes_ptr": "*u8", "windows_ptr": "*i32", "mean_ptr": "*fp32"}
        for half in HALVES:
            compile_for(crop_kernel, arch, constants, 4, types, half)

    @every_chip
    def test_rows_compile(arch):
        types = {"bias_ptr": "*fp32", "epsilon": "fp32", "length": "fp32"}
        for half in HALVES:
            constants = {"HALF": 128, "WIDTH": 128, "ROWS": 4, "HAS_BIAS": True, "SCALE": True}
            compile_for(join_kernel, arch, constants, 4, types, half)
            constants = {"D": 256, "WIDTH": 256, "ROWS": 4}
            compile_for(with_length_kernel, arch, constants, 4, types, half)
            for scale in (False, True):
                constants = {"D": 256, "C": 64, "ROWS": 16, "SCALE": scale}
                assert "mma" in compile_for(project_kernel, arch, constants, 4, types, half).asm["ptx"]

    @every_chip
    @pytest.mark.parametrize("grid", [16, 32])
    def test_choose_compiles(arch, grid):
        constants = choose_constants(5, grid**2)
        types = dict.fromkeys(("size_penalty", "window_share", "smoothing"), "fp32")
        compile_for(choose_kernel, arch, constants, choose_warps(constants), types, "*fp32")

else:
    import threading

    import dmv_fast.kernels.crop as crop_module
    from dmv_fast.kernels import rows as row_kernels
    from dmv_fast.kernels.choose import choose
    from dmv_fast.kernels.crop import crop
    from dmv_fast.kernels.vote import make_vote
    from lively import lively
    from maps import convolved

    from dmv_fast.model.dmv import DMV, DMVConfig
    from dmv_fast.model.pick import PickConfig, cosine_window, pick
    from dmv_fast.model.voting import VotingNet
    from dmv_fast.runtime import cuda, hardware, rows
    from dmv_fast.runtime.convolution import Convolution
    from dmv_fast.runtime.fold import fold_vote
    from dmv_fast.runtime.frame import FrameStep
    from dmv_fast.runtime.network import FastNetwork, PlainNetwork
    from dmv_fast.vision.boxes import anchor_grid, decode
    from dmv_fast.vision.crop import Window, cut, mean_colour, search_window

    skip_without_loops()
    CPU = torch.device("cpu")
    crop_module.BLOCK = 1024  # fewer programs: the interpreter runs one after the other

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

    def voted(vote, rows):
        """Into a part of wider rows, which are left alone where they are not its."""
        room = torch.full((*rows.shape[:2], 100), torch.nan, dtype=rows.dtype)
        vote(rows, room[..., 4:])
        assert room[..., :4].isnan().all()
        return room[..., 4:]

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 17, 32])
    def test_vote(read, k):
        rows = torch.randn(1, 7, k, 64)
        found = voted(make_vote(fold_vote(read), torch.float32, CPU), rows)
        torch.testing.assert_close(found, read.voting(rows), atol=1e-5, rtol=1e-5)

    def test_vote_in_half(read):
        rows = torch.randn(2, 5, 6, 64).half()
        found = voted(make_vote(fold_vote(read), torch.float16, CPU), rows)
        torch.testing.assert_close(found.float(), read.voting(rows.float()), atol=5e-3, rtol=5e-3)

    def test_vote_keeps_locations_apart(read):
        vote = make_vote(fold_vote(read), torch.float32, CPU)
        rows = torch.randn(1, 9, 4, 64)
        assert isinstance(read.voting, VotingNet)
        before = voted(vote, rows)
        rows[0, 5] = torch.randn(4, 64)
        assert (voted(vote, rows) != before).any(-1)[0].nonzero().flatten().tolist() == [5]

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
        out, size = torch.full((2, 32, 32, 8), torch.nan), 32
        mean = torch.tensor([100.0, 110.0, 120.0])
        assert (window.side > size) == shrinks
        windows = torch.tensor([fields] * 2, dtype=torch.int32)
        crop(patch if len(patch) else torch.zeros(1, dtype=torch.uint8), windows, mean, out)
        expected = torch.from_numpy(cut(image, window, size).astype(np.float32)) - mean
        assert (out[..., :3] - expected).abs().max() <= most and out[..., 3:].isnan().all()

    @pytest.mark.parametrize("unit_scale", [True, False])
    def test_join_is_the_one_in_pytorch(unit_scale):
        torch.manual_seed(0)
        left, right, bias = torch.randn(2, 3, 5, 12), torch.randn(2, 3, 5, 12), torch.randn(24)
        out = torch.full((2, 2, 3, 5, 30), torch.nan)
        for place, join in zip(out, (row_kernels.join, rows.join), strict=True):
            if join is row_kernels.join:
                join(left, right, bias, place[..., :24], 1e-6 if unit_scale else None)
            else:
                join(left, right, bias, place[..., :24], unit_scale=unit_scale)
        assert out[..., 24:].isnan().all()
        torch.testing.assert_close(out[0, ..., :24], out[1, ..., :24])

    def test_with_length():
        torch.manual_seed(0)
        x = torch.randn(2, 9, 40)[..., 5:37]
        x[1, 3] = 0
        torch.testing.assert_close(row_kernels.with_length(x, 11.5), rows.with_length(x, 11.5))

    @pytest.mark.parametrize("epsilon", [None, 1e-3])
    def test_projection(monkeypatch, epsilon):
        torch.manual_seed(0)
        weight, bias = torch.randn(16, 32), torch.randn(16)
        x = torch.randn(2, 9, 40).half()[..., 5:37]
        expected = rows.Projection(weight, bias, dtype=torch.float32, device=CPU, epsilon=epsilon)(x.float())
        monkeypatch.setattr(hardware, "on_gpu", lambda device: True)
        project = rows.Projection(weight, bias, dtype=torch.float16, device=CPU, epsilon=epsilon)
        assert project._fused
        torch.testing.assert_close(project(x).float(), expected, atol=2e-2, rtol=5e-3)

    @pytest.mark.parametrize("config", [PickConfig(), PickConfig(smoothing=1.0), PickConfig(0.0, 0.0, 0.3)])
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_choice_is_the_one_of_pick(config, channels_last):
        torch.manual_seed(0)
        n, a, grid = 3, 5, 6
        answer = torch.randn(n, 5 * a, grid, grid)
        if channels_last:
            answer = answer.to(memory_format=torch.channels_last)
        logits, deltas = answer[:, :a], answer[:, a:].unflatten(1, (a, 4))
        anchors = anchor_grid(grid, 256, (1 / 3, 1 / 2, 1, 2, 3), 64)
        window, sizes = cosine_window(a, grid), torch.tensor([[60.0, 50.0], [20.0, 90.0], [64.0, 64.0]])
        found, scores, kept = (torch.full(s, torch.nan) for s in ((n, 5), logits.shape, deltas.shape))
        choose(logits, deltas, anchors, window, sizes, config, found, scores, kept)
        expected = pick(logits.sigmoid(), decode(deltas.movedim(2, -1), anchors), sizes, window, config)
        torch.testing.assert_close(found, torch.cat([expected.box, expected.score[:, None]], 1))
        torch.testing.assert_close(scores, logits.sigmoid())
        assert torch.equal(kept, deltas)

    def test_choice_among_numbers_that_are_none():
        """Nothing is read or written where there is no box."""
        a, grid = 5, 3
        logits, deltas = torch.full((1, a, grid, grid), torch.nan), torch.zeros(1, a, 4, grid, grid)
        found, scores, kept = torch.zeros(1, 5), torch.empty(logits.shape), torch.empty(deltas.shape)
        anchors, sizes = anchor_grid(grid, 256, (1 / 3, 1 / 2, 1, 2, 3), 64), torch.tensor([[64.0, 64.0]])
        choose(logits, deltas, anchors, cosine_window(a, grid), sizes, PickConfig(), found, scores, kept)
        assert found[0, 4].isnan()

    @pytest.fixture
    def no_gpu(monkeypatch):
        """A GPU's code on the CPU, kernels interpreted; what would be replayed is run again."""

        monkeypatch.setattr(hardware, "on_gpu", lambda device: True)
        monkeypatch.setattr(cuda, "record", lambda work, device, pool: work)
        monkeypatch.setattr(cuda, "_new_pool", object)
        monkeypatch.setattr(cuda.CudaFrameStep, "_wait", lambda self: None)
        monkeypatch.setattr(crop_module, "BLOCK", 256 * 256)

    rng = np.random.default_rng(0)
    IMAGES = [rng.integers(0, 255, (240, 300, 3), dtype=np.uint8) for _ in range(3)]
    BOXES = [(60.0, 50.0, 80.0, 70.0), (200.0, 150.0, 90.0, 100.0), (-10.0, 180.0, 70.0, 90.0)]
    # Their windows are all larger than 256: a smaller one is rounded differently by OpenCV.

    def windows_of(boxes):
        windows = [search_window(box) for box in boxes]
        return windows, np.array([w.to_crop(b)[2:] for w, b in zip(windows, boxes, strict=True)])

    def pair(model: DMV, *, targets: int = 1, k: int = 2, capacity: int = 3) -> list[FrameStep]:
        """The reference, and the same network by way of a GPU."""
        fast = FastNetwork(model, dtype=torch.float32, device=CPU, backend="reference")
        options = dict(k=k, capacity=capacity, pick=PickConfig(), targets=targets)
        plain = FrameStep(PlainNetwork(model, backend="reference"), **options)
        return [plain, cuda.CudaFrameStep(fast, **options)]

    def start(steps, boxes, image=IMAGES[0]):
        for step in steps:
            for place, box in enumerate(boxes):
                step.start(place, image, search_window(box), box)

    def assert_same(steps, image, boxes, atol=0.02):
        windows, sizes = windows_of(boxes)
        expected, found = (step.step(image, windows, sizes) for step in steps)
        np.testing.assert_allclose(found, expected, atol=atol)

    def test_step_writes_and_moves_as_the_plain_one(no_gpu):
        """Uploads, places and slots find their way: 3 targets of 4, of unequal memories, then 2."""
        steps = pair(lively(DMVConfig()), targets=4)
        start(steps, BOXES)
        assert_same(steps, IMAGES[1], BOXES)
        assert [step.write(1, 1) and step.write(0, 1) and step.write(1, 2) for step in steps] == [True] * 2
        plain, fast = (step.memory for step in steps)
        assert plain.valid.tolist() == fast.valid.tolist() == [512, 768, 256, 0]
        for step in steps:
            step.move(2, 0)
        assert_same(steps, IMAGES[1], [BOXES[2], BOXES[1]])
        assert steps[1].write(1, 3) and steps[0].write(1, 3)  # full: over the oldest but the first
        assert plain.slots[1].frames == fast.slots[1].frames == [0, 3, 2]
        torch.testing.assert_close(fast.keys, plain.keys, atol=1e-4, rtol=1e-4)
        project = steps[0].network.model.read.voting.value_in
        # A score at the encoder's floor may fall to either side of it.
        torch.testing.assert_close(fast.values, project(plain.values), atol=3e-2, rtol=1e-3)

    def test_clone_goes_its_own_way(no_gpu, monkeypatch):
        def record(work, device, pool):
            work()  # as before a capture, which leaves no trace in the memory
            return work

        monkeypatch.setattr(cuda, "record", record)
        (_, step) = pair(lively(DMVConfig()))
        start([step], BOXES[:1])
        windows, sizes = windows_of(BOXES[:1])
        step.step(IMAGES[1], windows, sizes)
        before = step.memory.keys.clone(), step.memory.valid.clone()
        other = step.clone()
        assert other.write(0, 1) and other.memory.valid.item() == 512 and step.memory.valid.item() == 256
        assert torch.equal(step.memory.keys, before[0])
        assert step.write(0, 1)  # what the original saw is still there, and gives the same
        assert torch.equal(step.memory.keys, other.memory.keys)
        assert torch.equal(step.memory.values, other.memory.values)
        buffers = [{t.data_ptr() for t in vars(s).values() if torch.is_tensor(t)} for s in (step, other)]
        constants = {step._window.data_ptr(), step._anchors.data_ptr()}
        assert buffers[0] & buffers[1] <= constants

    @pytest.mark.parametrize(
        "config, k, enlarged, box",
        [
            (DMVConfig(), 1, 5, (400.0, 420.0, 275.0, 275.0)),  # a window larger than what goes up whole
            (DMVConfig(similarity="dot"), 32, 1, (280.0, 220.0, 90.0, 90.0)),
        ],
        ids=["large window, K = 1", "dot, K = 32"],
    )
    def test_step_of_other_networks(no_gpu, config, k, enlarged, box):
        first, *images = (cv2.resize(image, None, fx=enlarged, fy=enlarged) for image in IMAGES)
        steps = pair(lively(config), k=k, capacity=2)
        start(steps, [box], first)
        for image in images:
            assert_same(steps, image, [box], atol=0.1)
            assert all(step.write(0, 1) for step in steps)

    @pytest.mark.slow
    def test_step_in_half_precision(no_gpu):
        """With the kernels that want it, the vote's and the projections'."""
        model = lively(DMVConfig())
        network = FastNetwork(model, dtype=torch.float16, device=CPU, backend="auto")
        steps = pair(model)[:1] + [cuda.CudaFrameStep(network, k=2, capacity=2, pick=PickConfig())]
        start(steps, BOXES[:1])
        assert_same(steps, IMAGES[1], BOXES[:1], atol=1.0)

    def test_step_without_triton(no_gpu, monkeypatch):
        monkeypatch.setattr(hardware, "triton_runs", lambda device: False)
        steps = pair(lively(DMVConfig()), targets=2)
        start(steps, BOXES[:2])
        assert_same(steps, IMAGES[1], BOXES[:2])
        assert all(step.write(1, 1) for step in steps)
        assert_same(steps, IMAGES[2], BOXES[:2])

    def test_many_large_windows_fit_into_one_upload(no_gpu, monkeypatch):
        """What does not fit goes up at its final size; no window takes another's room."""
        monkeypatch.setattr(cuda, "_MOST", 3 * 256**2 * 3 + 20_000)
        (_, step) = pair(lively(DMVConfig()), targets=3)
        windows, sizes = windows_of([(x, 60.0, 80.0, 70.0) for x in (100.0, 101.0, 102.0)])
        with torch.inference_mode():
            step._upload(IMAGES[0], windows, sizes)
        begins, widths, sides = (step._header[:, i].tolist() for i in (0, 1, 5))
        assert sides == [windows[0].side, 256, 256] and widths[1:] == [256, 256]
        size = widths[0] * step._header[0, 2].item() * 3
        assert begins == [0, size, size + 3 * 256**2]
        assert begins[2] + 3 * 256**2 <= len(step._inbox) - step._pixels_at
        last = step._inbox[step._pixels_at + begins[2] :][: 3 * 256**2].view(256, 256, 3)
        assert np.array_equal(last, cut(IMAGES[0], windows[2]))

    def test_write_wants_a_step(no_gpu):
        (_, step) = pair(lively(DMVConfig()), targets=2)
        start([step], BOXES[:1])
        step.step(IMAGES[1], *windows_of(BOXES[:1]))
        step.start(1, IMAGES[1], search_window(BOXES[1]), BOXES[1])
        with pytest.raises(AssertionError, match="write before step"):
            step.write(0, 1)

    def test_few_graphs_serve_many_targets():
        served = [cuda._served(n) for n in range(1, 65)]
        assert all(s == n or n < s < 1.5 * n for n, s in enumerate(served, start=1))
        assert sorted(set(served)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]

    @pytest.mark.parametrize("relu, residual", [(True, False), (True, True), (False, False)])
    @pytest.mark.parametrize("groups, stride, dilation", [(1, 2, 1), (1, 1, 2), (2, 1, 1)])
    def test_convolution_of_a_gpu(no_gpu, monkeypatch, relu, residual, groups, stride, dilation):
        """Laid out as for cuDNN; its fused routine stands in as cuDNN describes it, or is not there."""

        def fused(x, weight, z, alpha, bias, stride, padding, dilation, groups):
            calls.append(z.shape)
            assert x.shape[1] == weight.shape[1] and groups == 1 and z.shape[1] == weight.shape[0]
            y = torch.conv2d(x.float(), weight.float(), bias.float(), stride, padding, dilation)
            return (y + alpha * z.float()).relu().to(x.dtype)

        torch.manual_seed(0)
        weight, bias = torch.randn(12, 8 // groups, 3, 3), torch.randn(12)
        x = torch.randn(2, 9, 7, 8).half()
        geometry = dict(stride=stride, padding=dilation, dilation=dilation)
        expected = convolved(x.float(), weight.half().float(), bias, groups=groups, **geometry)
        onto = torch.randn(expected.shape).half() if residual else None
        expected = expected + onto.float() if residual else expected
        expected = expected.relu() if relu else expected
        monkeypatch.setattr("dmv_fast.runtime.convolution.device_ms", lambda call: 0.0)
        for there in (False, True):
            calls = []
            if there:
                monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fused)
            where = dict(dtype=torch.float16, device=CPU)
            run = Convolution(weight, bias, relu=relu, groups=groups, **where, **geometry)
            for _ in range(2):
                found = run(x, None if onto is None else onto.clone())
                torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=5e-3)
            assert len(calls) == (3 if there and relu else 0)  # once to see that it is right, then twice

    def test_a_wrong_or_slow_routine_is_not_used(no_gpu, monkeypatch):
        x = torch.randn(1, 5, 5, 8).half()
        build = lambda: Convolution(  # noqa: E731
            torch.randn(8, 8, 3, 3), torch.zeros(8), relu=True, padding=1, dtype=torch.float16, device=CPU
        )
        wrong = lambda x, w, z, *rest: torch.full_like(z, torch.nan)  # noqa: E731
        monkeypatch.setattr("dmv_fast.runtime.convolution.device_ms", lambda call: 0.0)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", wrong)
        assert build()(x).isfinite().all()
        right = lambda x, w, z, a, b, s, p, d, g: (torch.conv2d(x, w, b, s, p, d, g) + z).relu()  # noqa: E731
        slow = iter([2.0, 1.0])
        monkeypatch.setattr("dmv_fast.runtime.convolution.device_ms", lambda call: next(slow))
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", right)
        convolution = build()
        convolution(x)
        assert list(convolution._pays.values()) == [False]

    def test_one_capture_at_a_time(no_gpu, monkeypatch):
        """Two threads that start trackers do not record into each other's graphs."""
        inside, most = [0], [0]

        def record(work, device, pool):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.02)
            inside[0] -= 1
            return work

        monkeypatch.setattr(cuda, "record", record)
        _, step = pair(lively(DMVConfig()))
        others = [step.clone() for _ in range(3)]
        threads = [threading.Thread(target=other._recorded_step, args=(1,)) for other in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 1 and all(len(other._steps) == 1 for other in others)
