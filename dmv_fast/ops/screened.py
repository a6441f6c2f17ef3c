"""float32 retrieval that products of bytes screen the keys for, on a CPU with AVX-512 (AVX512_VNNI) or AMX.

Every 32 keys stand in the memory as bytes, and as they are behind. The bytes are multiplied; they tell which
few keys may be among the best, and those are multiplied in float32 (csrc/screen_int8.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmv_fast.ops.backends import check_backend, cpu_kernel_runs
from dmv_fast.ops.retrieve import retrieve_reference


def screening_runs() -> bool:
    """Whether this processor retrieves by screening."""
    return cpu_kernel_runs("retrieve_screened_cpu")


def packed_width(depth: int) -> int:
    """How many bytes wide `pack_keys` makes keys of that depth."""
    return 5 * depth + 16


def turn(rows: Tensor) -> Tensor:
    """Rows (..., D), D a multiple of 32, turned in space, so that all products of rows stay what they are.

    Each number is spread over as many as there are 16s in the largest power of two that divides D (a Hadamard
    matrix), so that few stand out: a row's bytes, whose scale is its largest number's, are then half as far
    off, and so many fewer keys pass the screen.
    """
    depth = rows.shape[-1]
    count = (depth & -depth) // 16
    hadamard = torch.ones(1, 1, dtype=rows.dtype, device=rows.device)
    while len(hadamard) < count:
        hadamard = torch.cat([torch.cat([hadamard, part], 1) for part in (hadamard, -hadamard)])
    return (hadamard @ rows.unflatten(-1, (-1, count, 16)) / count**0.5).flatten(-3)


def pack_keys(rows: Tensor) -> Tensor:
    """Keys (B, N, D) float32, N and D multiples of 32 -> (B, N, 5 D + 16) uint8, laid out in 32s.

    First the 32, turned, as bytes: whole numbers up to 127 times a scale of each row, so that all a frame
    reads of most keys lies side by side. Then those scales, 128 times the sums of the bytes, how far each row
    is from its bytes times the scale, and its length. Then the 32 as they are. Any whole 32s of keys can be
    written in the place of others.
    """
    batch, count, depth = rows.shape
    if count % 32 or depth % 32 or not depth:
        raise ValueError(f"rows: has shape {tuple(rows.shape)}, N and D must be multiples of 32")
    rows = rows.detach().float()
    turned = turn(rows.double())
    scale = (turned.abs().amax(-1, keepdim=True) / 127).float()
    whole = (turned / scale).nan_to_num(0, 0, 0).round().clamp(-127, 127)
    off = (turned - whole * scale).norm(dim=-1, keepdim=True)
    length = rows.double().norm(dim=-1, keepdim=True)
    sums = 128 * whole.float().sum(-1, keepdim=True)
    more = 1 + 2**-20  # than float32 rounds down
    in_bytes = whole.to(torch.int8).contiguous().view(torch.float32)
    parts = in_bytes, scale, sums, (off * more).float(), (length * more).float(), rows
    blocks = [part.reshape(batch, count // 32, -1) for part in parts]
    return torch.cat(blocks, -1).view(torch.uint8).view(batch, count, packed_width(depth))


def unpack_keys(keys: Tensor) -> Tensor:
    """What `pack_keys` was given."""
    batch, count, width = keys.shape
    depth = (width - 16) // 5
    blocks = keys.reshape(batch, count // 32, 32 * width).view(torch.float32)
    return blocks[..., -32 * depth :].reshape(batch, count, depth)


def retrieve_screened_reference(
    query: Tensor, keys: Tensor, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification of `retrieve_screened`."""
    scores, indices = retrieve_reference(query, unpack_keys(keys), k, valid)
    return scores / scores.sum(-1, keepdim=True), indices


def retrieve_screened(
    query: Tensor,  # (B, M, D)
    keys: Tensor,  # (B, N, 5 D + 16)
    k: int,
    *,
    valid: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.retrieve` over what `pack_keys` gave, where `screening_runs`; scores among the k; no gradients.

    Args:
        query: (B, M, D) float32, D a multiple of 32 up to 512.
        keys: N a multiple of 32, keys without gaps between them.
        k: columns to return, 1 to 32.
        valid: how many leading keys exist, None (all), an int, or an int32 tensor (B,).

    Returns:
        scores (B, M, k) float32 and indices (B, M, k) int32, as retrieve. The set is an exact top-k of the
        float32 logits. The scores are the softmax over these k columns alone, retrieve's over their sum, as
        the vote weighs candidates; of all other keys only the bytes are known. Of equal keys the smaller
        index need not come first.

    Raises:
        ValueError: for valid, or where the C++ extension is not there.
        RuntimeError: naming another argument, or where the processor has no such instructions.
    """
    check_backend("cpu", query.device.type)
    if keys.dtype != torch.uint8:
        raise ValueError(f"keys: are {keys.dtype}, they must be what pack_keys gives")
    if valid is not None and not isinstance(valid, Tensor):
        count = int(valid)
        if not 0 <= count <= keys.shape[1]:
            raise ValueError(f"valid: is {count}, it must be 0..{keys.shape[1]}, the number of keys")
        valid = keys.new_full((len(keys),), count, dtype=torch.int32)
    if keys.shape[1] == 0:
        return retrieve_screened_reference(query, keys, k, valid)
    rows = keys.view(torch.float32)
    return torch.ops.dmv_fast.retrieve_screened_cpu.default(query.contiguous(), rows, k, valid)
