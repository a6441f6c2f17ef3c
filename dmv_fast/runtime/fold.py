"""Linear algebra done once at load: batch norm to scale and bias, the voting net's matrices into each other.

Everything is computed in float64 and returned in float32. Each fold is an identity, so the fast path equals
the reference within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmv_fast.model.retrieval import MemoryRead, SoftmaxRead
from dmv_fast.model.voting import VotingNet


def norm_line(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A batch norm as x * scale + bias: two of (C,), the scale still in float64."""
    assert norm.running_mean is not None and norm.running_var is not None, "ours all keep statistics"
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return scale, bias.float()


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """A convolution's weight (C_out, C_in, h, w) with the scale (C_out,) of its outputs in it."""
    return (weight.double() * scale.double()[:, None, None, None]).float()


def panels(weight: Tensor) -> Tensor:
    """(..., C_out, C_in) -> (..., C_out / 32, C_in, 32), as the CPU's float32 products read them."""
    return weight.float().unflatten(-2, (-1, 32)).transpose(-1, -2).contiguous()


def whole_panels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same as int16 (..., C_out / 32, C_in / 2, 32, 2) times a scale (..., C_out), float32.

    What is summed for one of C_out is at most 65,000 long: see csrc/product_panel_int16.h.
    """
    weight = weight.detach().double()
    length = torch.linalg.vector_norm(weight, dim=-1)
    scale = torch.maximum(weight.abs().amax(-1) / 32767, length / 65000)
    scale = torch.where(scale == 0, 1.0, scale)  # NaN, where a weight is, for all of that channel
    whole = (weight / scale[..., None]).round().to(torch.int16)
    pairs = whole.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 32)).transpose(-3, -2)
    return pairs.contiguous(), scale.float()


def weights_at_points(points: Sequence[float], taps: int) -> Tensor:
    """Winograd's G (points + 1, taps), float64: taps of a filter to its values at points and at infinity.

    A point's row is the taps' polynomial there, divided by the product of its distances to the others.
    """
    g = torch.zeros(len(points) + 1, taps, dtype=torch.float64)
    for row, at in enumerate(points):
        share = math.prod(at - other for other in points if other != at)
        for power in range(taps):
            g[row, power] = at**power / share
    g[-1, -1] = 1
    return g


FOUR_TAP_POINTS = (0.5, -0.5, 1.0, -1.0, 2.0, -2.0)  # of csrc/conv_pixels_float32.h
TWO_TAP_POINTS = tuple(root * sign for root in (math.sqrt(0.5), math.sqrt(2)) for sign in (1, -1))
THREE_TAP_POINTS = (0.0, *TWO_TAP_POINTS)  # both of csrc/conv_winograd.h


def fold_pixels(weight: Tensor, deviation: tuple[float, ...]) -> Tensor:
    """conv1 on (pixel - mean) in BGR, instead of on RGB divided by 255 and by the deviation (R, G, B).

    What is padded, zero in both, stays the mean colour; so the fold holds at the border too.
    """
    scale = 1 / (255 * torch.tensor(deviation, dtype=torch.float64, device=weight.device))
    return (weight.double() * scale[:, None, None]).flip(1).float()


class VoteWeights(NamedTuple):
    """The voting net, folded; every fold is an identity.

    Candidate i hears its neighbours x_j as sum_h U_h (sum_j a_hij x_j), where a_hi is the softmax over j != i
    of 2-based logits (to_q x_i + q_bias) . (to_k x_j). A bias of k would add the same to all logits of a row,
    so there is none. U_h = merge . message_h . v_h. The layer norm's mean is taken out of `mix`, its scale
    and shift are in `out`. H: the number of heads.
    """

    value_in: Tensor
    """(C, V)"""
    null: Tensor
    """(C,): the null column's value, already through value_in."""
    query_in: Tensor
    """(C, D)"""
    query_bias: Tensor
    """(C,)"""
    to_q: Tensor
    """(H * C/4, C), times log2(e) / sqrt(C/4): the softmax is one of powers of 2."""
    q_bias: Tensor
    """(H * C/4,)"""
    to_k: Tensor
    """(H * C/4, C)"""
    mix: Tensor
    """(C, H * C + C): U_1 .. U_H, then what merge does to the candidate itself."""
    mix_bias: Tensor
    """(C,)"""
    out: Tensor
    """(V, C)"""
    out_bias: Tensor
    """(V,)"""
    epsilon: float
    """Of the layer norm."""

    @property
    def heads(self) -> int:
        """H."""
        return self.mix.shape[1] // self.mix.shape[0] - 1


def fold_vote(read: MemoryRead | SoftmaxRead) -> VoteWeights:
    """The weights of a memory read that votes, multiplied together as far as they go."""
    assert isinstance(read, MemoryRead) and isinstance(read.voting, VotingNet), "the other readers stay plain"
    net = read.voting
    value_in = net.value_in.weight.double()
    scale = math.log2(math.e) / math.sqrt(net.head_dim)
    width = value_in.shape[0]
    on_itself, on_message = net.merge.weight.double().split(width, 1)
    to_v = net.to_v.weight.double().view(net.heads, width, width)
    message = net.message.weight.double().view(width, net.heads, width)
    heard = torch.einsum("oc,chv,hvi->ohi", on_message, message, to_v).flatten(1)
    mix = torch.cat([heard, on_itself], 1)
    out = net.out.weight.double()

    def stored(weight: Tensor) -> Tensor:
        return weight.detach().float().contiguous()

    return VoteWeights(
        value_in=stored(value_in),
        null=stored(value_in @ read.null_value.double()),
        query_in=stored(net.query_in.weight),
        query_bias=stored(net.query_in.bias),
        to_q=stored(net.to_q.weight.double() * scale),
        q_bias=stored(net.to_q.bias.double() * scale),
        to_k=stored(net.to_k.weight),
        mix=stored(mix - mix.mean(0)),
        mix_bias=stored(net.merge.bias.double() - net.merge.bias.double().mean()),
        out=stored(out * net.norm.weight.double()),
        out_bias=stored(out @ net.norm.bias.double() + net.out.bias.double()),
        epsilon=net.norm.eps,
    )
