"""One folded convolution, run by the fastest routine that this device's PyTorch has for it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast.ops.backends import cpu_kernel_runs
from dmv_fast.runtime import hardware
from dmv_fast.runtime.fold import (
    THREE_TAP_POINTS,
    TWO_TAP_POINTS,
    norm_line,
    panels,
    scaled,
    weights_at_points,
    whole_panels,
)
from dmv_fast.runtime.parts import Products, bfloat16_parts

if TYPE_CHECKING:
    from typing_extensions import NotRequired, Unpack  # of typing from Python 3.11 on


class Where(TypedDict):
    """What every layer is told of where, and how, it runs."""

    dtype: torch.dtype
    device: torch.device
    products: NotRequired[Products]
    """By default "own"."""


@functools.cache
def onednn_packs_weights() -> bool:
    """Whether this PyTorch has the operators of its own compiler that take weights laid out beforehand.

    F.conv2d brings the weights into oneDNN's layout at every call: 23 MB a frame in DMV18.
    """
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_convolution_pointwise_")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, n) for n in names)


def amx_runs() -> bool:
    """Whether the convolution of our own runs here (csrc/conv_amx.cpp): on processors with AMX."""
    return cpu_kernel_runs("convolve_cpu")


def int16_runs() -> bool:
    """Whether products of 16-bit whole numbers run here: on processors with AVX512_VNNI."""
    return cpu_kernel_runs("convolve_winograd_int16_cpu")


class Convolution:
    """x (B, H, W, C_in) -> relu(scale * convolution + bias), where `relu` says so: (B, h, w, C_out).

    `__call__(x, onto)` is a residual block's end: relu(scale * convolution + bias + onto), maybe written over
    onto, which must not be x. scale and bias (C_out,); None is one and zero. oneDNN adds the bias in float32,
    but not at a block's end; our own kernels do always, and that for AMX leaves the scale out of the weights.
    products, of dtype float32. "bfloat16x3": each number is two of bfloat16, three of whose four products are
    summed, and two where the weights are bfloat16 numbers. "int16": each row of numbers that is summed over
    is whole numbers times a scale, right to 1e-4 of the row or so (csrc/product_panel_int16.h). What our own
    kernels do not take (channels in other than 16s or 32s; "int16": groups) stays plain float32. That is ours
    where it is 3 x 3 (csrc/conv_winograd.h) or 1 x 1 (conv_pointwise.h).
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, relu: bool, dtype: torch.dtype, device: torch.device,
        scale: Tensor | None = None, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
        products: Products = "own",
    ):  # fmt: skip
        gpu = hardware.on_gpu(device)
        self._geometry = ([padding] * 2, [stride] * 2, [dilation] * 2, groups)
        self._relu, self._kernel, self._c_out = relu, weight.shape[2], len(weight)
        self._wide_bias: Tensor | None
        self._pays: dict[torch.Size, bool] = {}
        self._sizes: dict[torch.Size, tuple[int, ...]] = {}
        on_cpu = not gpu and device.type == "cpu"
        if on_cpu and _suits_amx(weight, groups, dtype, products):
            self._run, self._weight = self._amx, _amx_tiles(weight, in_parts=products == "bfloat16x3")
            self._scale = torch.ones(len(weight)) if scale is None else scale.float()
            self._wide_bias = _full_bias(weight, bias)
            return
        weight = weight if scale is None else scaled(weight, scale)
        plain = on_cpu and dtype == torch.float32
        winograd = plain and _suits_winograd(weight, stride, dilation, groups)
        if winograd or (plain and _suits_pointwise(weight, padding, groups, products)):
            matrices = _winograd_points(weight, stride) if winograd else weight[:, :, 0, 0].detach()
            self._wide_bias = _full_bias(weight, bias)
            if products == "int16" and groups == 1:
                self._run = self._winograd_int16 if winograd else self._pointwise_int16
                self._weight, self._scale = whole_panels(matrices)
            else:
                self._run, self._weight = self._winograd if winograd else self._pointwise, panels(matrices)
            return
        if gpu and groups > 1:
            weight, self._geometry = _ungrouped(weight, groups), (*self._geometry[:3], 1)
        self._weight = weight.to(device, dtype, memory_format=torch.channels_last)
        self._bias = None if bias is None else bias.to(device, dtype)
        self._wide_bias = None if bias is None else bias.to(device, torch.float32)
        self._run, self._routine = self._by_pytorch, self._plain
        if gpu and dtype != torch.float32:
            self._routine = self._cudnn_if_it_pays
        elif on_cpu and onednn_packs_weights():
            pack = torch.ops.mkldnn._reorder_convolution_weight.default
            size = [1, weight.shape[1] * groups, 32, 32]  # a hint; any size gave the same layout
            self._routine, self._weight = self._onednn, pack(self._weight, *self._geometry, size)

    @classmethod
    def of(
        cls, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, *, relu: bool, **where: Unpack[Where]
    ) -> Convolution:
        """The layers of the reference network, folded."""
        scale, bias = (None, conv.bias) if norm is None else norm_line(norm)
        return cls(
            conv.weight, bias, scale=scale, relu=relu, stride=conv.stride[0], padding=padding_of(conv),
            dilation=conv.dilation[0], groups=conv.groups, **where,
        )  # fmt: skip

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        return self._run(x, onto)

    # ---- our own kernels -----------------------------------------------------------------------------

    def _amx(self, x: Tensor, onto: Tensor | None) -> Tensor:
        (padding, _), (stride, _), (dilation, _), groups = self._geometry
        tensors, geometry = (self._weight, self._scale), (self._kernel, stride, padding, dilation, groups)
        return self._ours(torch.ops.dmv_fast.convolve_cpu.default, x, onto, tensors, geometry)

    def _winograd(self, x: Tensor, onto: Tensor | None) -> Tensor:
        (padding, _), (stride, _), (dilation, _), groups = self._geometry
        run, geometry = torch.ops.dmv_fast.convolve_winograd_cpu.default, (stride, padding, dilation, groups)
        return self._ours(run, x, onto, (self._weight,), geometry)

    def _winograd_int16(self, x: Tensor, onto: Tensor | None) -> Tensor:
        (padding, _), (stride, _), (dilation, _), _ = self._geometry
        run, geometry = torch.ops.dmv_fast.convolve_winograd_int16_cpu.default, (stride, padding, dilation)
        return self._ours(run, x, onto, (self._weight, self._scale), geometry)

    def _pointwise(self, x: Tensor, onto: Tensor | None) -> Tensor:
        run, stride = torch.ops.dmv_fast.convolve_pointwise_cpu.default, self._geometry[1][0]
        return self._ours(run, x, onto, (self._weight,), (stride,))

    def _pointwise_int16(self, x: Tensor, onto: Tensor | None) -> Tensor:
        run, stride = torch.ops.dmv_fast.convolve_pointwise_int16_cpu.default, self._geometry[1][0]
        return self._ours(run, x, onto, (self._weight, self._scale), (stride,))

    def _ours(
        self, run: Callable[..., None], x: Tensor, onto: Tensor | None, tensors: tuple[Tensor, ...],
        geometry: tuple[int, ...],
    ) -> Tensor:  # fmt: skip
        """By one of our operators, which take the same things in the same order."""
        out, add = self._out(x, onto), onto is not None
        run(x.contiguous(), *tensors, self._wide_bias, out, add, self._relu or add, *geometry)
        return out

    def _out(self, x: Tensor, onto: Tensor | None) -> Tensor:
        """Where the result goes; its size is found out once for each of x, not 27 times a frame."""
        if onto is not None:
            return onto.contiguous()
        size = self._sizes.get(x.shape)
        if size is None:
            (padding, _), (stride, _), (dilation, _), _ = self._geometry
            reach = dilation * (self._kernel - 1)
            h, w = ((length + 2 * padding - reach - 1) // stride + 1 for length in x.shape[1:3])
            size = self._sizes[x.shape] = (len(x), h, w, self._c_out)
        return x.new_empty(size)

    # ---- PyTorch's routines, which name the channels first, wherever they lie: (B, C, H, W) ----------

    def _by_pytorch(self, x: Tensor, onto: Tensor | None) -> Tensor:
        onto = None if onto is None else onto.permute(0, 3, 1, 2)
        return self._routine(x.permute(0, 3, 1, 2), onto).permute(0, 2, 3, 1)

    def _onednn(self, x: Tensor, onto: Tensor | None) -> Tensor:
        if onto is not None:
            run = torch.ops.mkldnn._convolution_pointwise_.binary
            return run(
                onto, x, self._weight, self._bias, *self._geometry, "add", 1.0, "relu", [], ""
            )  # fmt: skip
        activation = "relu" if self._relu else "none"
        run = torch.ops.mkldnn._convolution_pointwise.default
        return run(x, self._weight, self._wide_bias, *self._geometry, activation, [], "")

    def _cudnn_if_it_pays(self, x: Tensor, onto: Tensor | None) -> Tensor:
        """In one kernel where cuDNN has one that is right and no slower; found out once for each shape."""
        if onto is None and not self._relu:
            return self._plain(x, None)
        if x.shape not in self._pays:
            self._pays[x.shape] = self._cudnn_pays(x, onto)
        return (self._cudnn if self._pays[x.shape] else self._plain)(x, onto)

    def _cudnn_pays(self, x: Tensor, onto: Tensor | None) -> bool:
        expected = self._plain(x, onto)
        try:
            found = self._cudnn(x, onto)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # it has none for this shape
            return False
        if not (found - expected).abs().max() <= 0.02 * expected.abs().max():
            return False
        return device_ms(lambda: self._cudnn(x, onto)) <= device_ms(lambda: self._plain(x, onto))

    def _cudnn(self, x: Tensor, onto: Tensor | None) -> Tensor:
        padding, stride, dilation, groups = self._geometry
        if onto is None:
            # Not cudnn_convolution_relu: it adds 0 times what lay in its output's memory, a NaN maybe.
            size, (h, w) = (len(x), self._weight.shape[0]), self._weight.shape[2:]
            rows, columns = (
                (length + 2 * padding[0] - dilation[0] * (kernel - 1) - 1) // stride[0] + 1
                for length, kernel in ((x.shape[2], h), (x.shape[3], w))
            )
            onto = _zeros((size[0], rows, columns, size[1]), x.dtype, x.device).permute(0, 3, 1, 2)
        # A search would build every plan there is, and fused ones are compiled for that.
        with cudnn_search(False):
            return torch.cudnn_convolution_add_relu(
                x, self._weight, onto, 1.0, self._bias, stride, padding, dilation, groups
            )

    def _plain(self, x: Tensor, onto: Tensor | None) -> Tensor:
        padding, stride, dilation, groups = self._geometry
        y = F.conv2d(x, self._weight, self._bias, stride, padding, dilation, groups)
        if onto is not None:
            return y.add_(onto).relu_()
        return y.relu_() if self._relu else y


def _full_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A float32 number for each channel, as our own kernels take them."""
    return torch.zeros(len(weight)) if bias is None else bias.detach().float()


def padding_of(conv: nn.Conv2d) -> int:
    """Of a square convolution whose padding is a number and not a rule."""
    assert not isinstance(conv.padding, str)
    return conv.padding[0]


@contextlib.contextmanager
def cudnn_search(search: bool) -> Iterator[None]:
    """Whether cuDNN times its algorithms against each other; afterwards it is as the user had it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = search
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _suits_amx(weight: Tensor, groups: int, dtype: torch.dtype, products: Products) -> bool:
    """Whether our own kernel takes this convolution, and takes no longer than oneDNN.

    Measured on ResNet18's and ResNet50's shapes: in bfloat16 slower only for 1 x 1 of many channels.
    """
    c_out, c_in, height, width = weight.shape
    if height != width or c_in % 32 or c_out % (32 * groups) or not amx_runs():
        return False
    if products == "bfloat16x3":
        return dtype == torch.float32
    return dtype == torch.bfloat16 and (height > 1 or c_in <= 512)


def _amx_tiles(weight: Tensor, *, in_parts: bool) -> Tensor:
    """(C_out, C_in, h, w) -> bfloat16 tiles in the order in which csrc/conv_amx.cpp reads them.

    A tile is 32 channels in, in pairs, by 16 out. The second parts are left out where all are zero.
    """
    c_out, c_in, height, width = weight.shape
    halves = bfloat16_parts(weight)
    halves = halves[: 2 if in_parts and halves[1].any() else 1]
    blocks = halves.view(len(halves), c_out // 32, 2, 16, c_in // 32, 16, 2, height, width)
    return blocks.permute(1, 7, 4, 8, 0, 2, 5, 3, 6).contiguous()


def _suits_winograd(weight: Tensor, stride: int, dilation: int, groups: int) -> bool:
    """Whether Winograd's convolution takes this one: 3 x 3, not dilated where it strides."""
    c_out, c_in, *size = weight.shape
    steps = stride == 1 or (stride, dilation) == (2, 1)
    whole = c_in % 16 == 0 and c_out % (32 * groups) == 0
    return size == [3, 3] and steps and whole and cpu_kernel_runs("convolve_winograd_cpu")


def _winograd_points(weight: Tensor, stride: int) -> Tensor:
    """(C_out, C_in, 3, 3) -> G w G' (36, C_out, C_in), float64, see csrc/conv_winograd.h."""
    g = torch.zeros(6, 3, dtype=torch.float64)
    if stride == 1:
        g = weights_at_points(THREE_TAP_POINTS, 3)
    else:  # even pixels meet the first and the last tap, odd ones the second alone
        g[:5, ::2] = weights_at_points(TWO_TAP_POINTS, 2)
        g[5, 1] = 1
    products = torch.kron(g, g) @ weight.detach().double().flatten(2).flatten(0, 1).T  # (36, C_out * C_in)
    return products.view(36, -1, weight.shape[1])


def _suits_pointwise(weight: Tensor, padding: int, groups: int, products: Products) -> bool:
    """Whether our own kernel takes this convolution: 1 x 1, of whole vectors of channels.

    In float32 not of many. Measured on ResNet18's and ResNet50's shapes: up to 40 % less time than oneDNN
    where that is mostly its call's, 1 to 4 % more from 256 times 1,024 channels on.
    """
    c_out, c_in, *size = weight.shape
    whole = c_in % 16 == 0 and c_out % 32 == 0 and (c_in * c_out < 256 * 1024 or products == "int16")
    fits = size == [1, 1] and (padding, groups) == (0, 1) and whole
    return fits and cpu_kernel_runs("convolve_pointwise_cpu")


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """(C_out, C_in / groups, h, w) -> (C_out, C_in, h, w), zero between groups: tensor cores prefer it."""
    per_out, per_in = weight.shape[0] // groups, weight.shape[1]
    whole = weight.new_zeros(weight.shape[0], per_in * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * per_out, (group + 1) * per_out)
        whole[rows, group * per_in : (group + 1) * per_in] = weight[rows]
    return whole


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros to read; all of one size are the same memory."""
    size = math.prod(shape)
    return _flat_zeros(1 << (size - 1).bit_length(), dtype, device)[:size].view(shape)


@functools.cache
def _flat_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    zeros = torch.zeros(size, dtype=dtype, device=device)
    if zeros.is_cuda:  # they are there before another stream may read them
        torch.cuda.current_stream(device).synchronize()
    return zeros


def device_ms(call: Callable[[], object], repeats: int = 10) -> float:
    """What one call takes on the current CUDA device, the least of some."""
    best = math.inf
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


def run_chain(convolutions: list[Convolution], x: Tensor) -> Tensor:
    """One after the other."""
    for convolution in convolutions:
        x = convolution(x)
    return x
