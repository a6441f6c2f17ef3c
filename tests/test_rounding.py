"""What bfloat16 on a CPU need not round is not rounded: pixels, and biases."""

from __future__ import annotations

import pytest
import torch

from dmv_fast.model.backbone import Backbone
from dmv_fast.runtime.convolution import Convolution, onednn_packs_weights
from dmv_fast.runtime.pixels import Pixels
from dmv_fast.runtime.trunk import Block
from dmv_fast.vision.crop import MEAN

MEAN_PIXEL = 255 * torch.tensor(MEAN[::-1])
WHERE = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
onednn = pytest.mark.skipif(not onednn_packs_weights(), reason="this PyTorch adds biases by another routine")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18").eval()


def test_pixels_are_whole_numbers_away_from_the_mean():
    crops = torch.arange(256, dtype=torch.uint8).repeat(3 * 256).view(1, 256, 256, 3)
    found = Pixels(torch.ones(64, 3, 7, 7), torch.zeros(64), MEAN_PIXEL, **WHERE).pixels(crops)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float() + MEAN_PIXEL.round(), crops.float())


def test_a_grey_crop_is_no_brighter_for_the_whole_mean(backbone):
    """conv1's bias makes up for what the whole numbers leave of the mean; the border is padded with them."""
    crops = torch.full((1, 256, 256, 3), 110, dtype=torch.uint8)
    weight = backbone.conv1.weight.detach() / 50
    half, full = (
        Pixels(weight, torch.zeros(64), MEAN_PIXEL, **{**WHERE, "dtype": dtype})
        for dtype in (torch.bfloat16, torch.float32)
    )
    found, expected = (p.convolution(p.pixels(crops)).float()[:, 4:-4, 4:-4] for p in (half, full))
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


@onednn
def test_a_bias_is_added_before_anything_is_rounded():
    bias = torch.tensor([1 + 2**-10, 100 + 2**-3] * 16)  # neither is a bfloat16
    weight = torch.zeros(32, 32, 1, 1)
    weight[torch.arange(32), torch.arange(32)] = 1.0
    x = -torch.tensor([1.0, 100.0] * 16).bfloat16().expand(1, 8, 8, 32)
    found = Convolution(weight, bias, relu=False, **WHERE)(x.contiguous())
    assert found.float()[0, 0, 0, :2].tolist() == [2**-10, 2**-3]


@onednn
def test_a_block_with_a_shortcut_keeps_both_biases_whole(backbone):
    block = backbone.layer2[0]
    with torch.no_grad():
        for conv in (block.conv1, block.conv2, block.downsample[0]):
            conv.weight.zero_()
        block.bn2.bias.fill_(100 + 2**-3)
        block.downsample[1].bias.fill_(-100.0)
    x = torch.zeros(1, 8, 8, 64).bfloat16()
    assert Block(block, **WHERE)(x).float().unique().tolist() == [2**-3]
