"""An image made smaller by averaging areas: a search crop of a large target, before the network."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from dmv_fast.ops.backends import cpu_operator_runs


def shrink_reference(image: np.ndarray, size: int) -> np.ndarray:
    """The specification: OpenCV's mean of what lies under each pixel."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """The image (H, W, 3) uint8, H, W >= size >= 1, as (size, size, 3).

    Equal to the reference to the bit. OpenCV takes the C++ way's two to three times, but for lengths that
    are a multiple of size: these stay its, as does what is not uint8 of three colours.
    """
    height, width, colours = image.shape
    ours = cpu_operator_runs("shrink_cpu") and colours == 3 and image.dtype == np.uint8
    if not ours or height % size == 0 or width % size == 0:
        return shrink_reference(image, size)
    # Neither mirrored memory is for torch, nor, without a warning, such as must not be written.
    if image.strides[0] < 0 or image.strides[1:] != (3, 1) or not image.flags.writeable:
        image = image.copy()
    out = np.empty((size, size, 3), np.uint8)
    torch.ops.dmv_fast.shrink_cpu.default(torch.from_numpy(image), torch.from_numpy(out))
    return out
