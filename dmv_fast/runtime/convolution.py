"""One folded convolution, run by the fastest routine that this device's PyTorch has for it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast.runtime.fold import fold_norm


@functools.cache
def onednn_packs_weights() -> bool:
    """Whether this PyTorch has the operators of its own compiler that take weights laid out beforehand.

    F.conv2d brings the weights into oneDNN's layout at every call: 23 MB a frame in DMV18.
    """
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_convolution_pointwise_")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, n) for n in names)


class Convolution:
    """x (B, C_in, H, W) channels-last -> relu(convolution + bias), where `relu` says so.

    `__call__(x, onto)` is a residual block's end: relu(convolution + bias + onto), maybe written over onto.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, *, relu: bool, dtype: torch.dtype, device: torch.device,
        stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
    ):  # fmt: skip
        self._geometry = ([padding] * 2, [stride] * 2, [dilation] * 2, groups)
        self._relu = relu
        self._weight = weight.to(device, dtype, memory_format=torch.channels_last)
        self._bias = bias.to(device, dtype)
        self._run = {"cpu": self._onednn, "cuda": self._cudnn}.get(device.type, self._plain)
        if device.type == "cpu":
            if onednn_packs_weights():
                pack = torch.ops.mkldnn._reorder_convolution_weight.default
                size = [1, weight.shape[1] * groups, 32, 32]  # a hint; any size gave the same layout
                self._weight = pack(self._weight, *self._geometry, size)
            else:
                self._run = self._plain

    @classmethod
    def of(cls, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, *, relu: bool, **where) -> Convolution:
        """The layers of the reference network, folded. where: dtype and device."""
        weight, bias = (conv.weight, conv.bias) if norm is None else fold_norm(conv, norm)
        geometry = {"stride": conv.stride[0], "padding": conv.padding[0], "dilation": conv.dilation[0]}
        return cls(weight, bias, relu=relu, groups=conv.groups, **geometry, **where)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        return self._run(x, onto)

    def _onednn(self, x: Tensor, onto: Tensor | None) -> Tensor:
        if onto is not None:
            run = torch.ops.mkldnn._convolution_pointwise_.binary
            return run(
                onto, x, self._weight, self._bias, *self._geometry, "add", 1.0, "relu", [], ""
            )  # fmt: skip
        activation = "relu" if self._relu else "none"
        run = torch.ops.mkldnn._convolution_pointwise.default
        return run(x, self._weight, self._bias, *self._geometry, activation, [], "")

    def _cudnn(self, x: Tensor, onto: Tensor | None) -> Tensor:
        padding, stride, dilation, groups = self._geometry
        rest = (self._bias, stride, padding, dilation, groups)
        if onto is not None:
            return torch.cudnn_convolution_add_relu(x, self._weight, onto, 1.0, *rest)
        if self._relu:
            return torch.cudnn_convolution_relu(x, self._weight, *rest)
        return self._plain(x, None)

    def _plain(self, x: Tensor, onto: Tensor | None) -> Tensor:
        padding, stride, dilation, groups = self._geometry
        y = F.conv2d(x, self._weight, self._bias, stride, padding, dilation, groups)
        if onto is not None:
            return y.add_(onto).relu_()
        return y.relu_() if self._relu else y


def run_chain(convolutions: list[Convolution], x: Tensor) -> Tensor:
    """One after the other."""
    for convolution in convolutions:
        x = convolution(x)
    return x
