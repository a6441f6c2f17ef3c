"""Where a GPU network's tensors are. "meta" stands for the GPU: what is of it meets no tensor of the CPU."""

from __future__ import annotations

import pytest
import torch

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.runtime import convolution, hardware
from dmv_fast.runtime.network import FastNetwork

GPU = torch.device("meta")


@pytest.fixture
def laid_out_for_a_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "on_gpu", lambda device: device == GPU)
    monkeypatch.setattr(hardware, "triton_runs", lambda device: False)
    monkeypatch.setattr(convolution.Convolution, "_cudnn_pays", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: 12.0)


@pytest.mark.usefixtures("laid_out_for_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("config", [
    DMVConfig(), DMVConfig("resnet50"), DMVConfig(grid=32), DMVConfig(similarity="dot"),
    DMVConfig(reader="vote+mean"),
], ids=lambda c: f"{c.backbone}-{c.grid}-{c.similarity}-{c.reader}")  # fmt: skip
@torch.inference_mode()
def test_everything_of_a_network_is_on_its_device(config, dtype):
    model = DMV(config).eval().requires_grad_(False).to(GPU)
    network = FastNetwork(model, dtype=dtype, device=GPU, backend="reference")
    B, T, M = 2, 3, model.locations
    maps = network.look(torch.zeros(B, 256, 256, 3, dtype=torch.uint8, device=GPU))
    bank = [
        torch.zeros(B, T * M, width, dtype=kind, device=GPU)
        for width, kind in ((network.key_width, network.key_dtype), (network.value_width, network.dtype))
    ]
    prediction = network.predict(maps, *bank, 4, torch.zeros(B, dtype=torch.int32, device=GPU))
    keys, values = network.remember(maps, prediction.logits.sigmoid(), prediction.deltas)
    assert {tensor.device for tensor in (maps, *prediction, keys, values)} == {GPU}
    assert keys.shape[1:] == (M, network.key_width) and values.shape[1:] == (M, network.value_width)
