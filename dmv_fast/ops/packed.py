"""float32 retrieval mostly by cheaper products, over keys that are stored packed for it; on a CPU only.

Two layouts, by what the processor has:
    tiles     with AMX: each number is two of bfloat16 (`ops.parts`), keys lie as the tiles that the matrix
              unit loads, and three of the four products of parts are summed (csrc/retrieve_amx.cpp).
    screened  with AVX-512 and its products of bytes (AVX512_VNNI): every 32 keys stand there as bytes, and as
              they are behind. The bytes tell which few keys may be among the best, and those are multiplied
              in float32 (csrc/screen_int8.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmv_fast.ops.backends import check_backend, cpu_kernel_runs
from dmv_fast.ops.parts import bfloat16_parts
from dmv_fast.ops.retrieve import retrieve_reference


def tiles_run() -> bool:
    """Whether this processor retrieves from keys in tiles: it has AMX."""
    return cpu_kernel_runs("retrieve_split_cpu")


def screening_runs() -> bool:
    """Whether this processor retrieves by screening: it has AVX512_VNNI and no AMX that may be used."""
    return cpu_kernel_runs("retrieve_screened_cpu")


def packed_width(depth: int) -> tuple[int, torch.dtype]:
    """How wide `pack_keys` makes keys of that depth, and of which numbers."""
    return (5 * depth + 16, torch.uint8) if screening_runs() else (2 * depth, torch.bfloat16)


# ---- AMX: two parts ----------------------------------------------------------------------------------


def parts_in_a_row(rows: Tensor) -> Tensor:
    """Queries (B, M, D) float32, of any stride -> (B, M, 2 D) bfloat16: first parts, then second ones."""
    return torch.cat(bfloat16_parts(rows).unbind(0), -1)


def to_tiles(rows: Tensor) -> Tensor:
    """Keys (B, N, D) float32, N a multiple of 16, D of 32 -> (B, N, 2 D) bfloat16 in tiles.

    16 keys lie together as (D / 32, 2 parts, 16, 32): what the matrix unit takes at once is one piece of
    memory. Any whole 16s of keys can be written in the place of others.
    """
    batch, count, depth = rows.shape
    tiles = bfloat16_parts(rows).view(2, batch, count // 16, 16, depth // 32, 32)
    return tiles.permute(1, 2, 4, 0, 3, 5).reshape(batch, count, 2 * depth)


def from_tiles(keys: Tensor) -> Tensor:
    """What `to_tiles` was given, within 2^-17 of it."""
    batch, count, width = keys.shape
    tiles = keys.float().view(batch, count // 16, width // 64, 2, 16, 32).sum(3)
    return tiles.transpose(2, 3).reshape(batch, count, width // 2)


# ---- AVX-512: bytes ------------------------------------------------------------------------------------


def bytes_before_blocks(rows: Tensor) -> Tensor:
    """Keys (B, N, D) float32, N a multiple of 32, D of 4 -> (B, N, 5 D + 16) uint8, laid out in 32s.

    First the 32 as bytes: whole numbers up to 127 times a scale of each row, so that all a frame reads of
    most keys lies side by side. Then those scales, 128 times the sums of the bytes, how far each row is from
    its bytes times the scale, and its length. Then the 32 as they are.
    """
    batch, count, depth = rows.shape
    if count % 32 or depth % 4:
        raise ValueError(f"rows: has shape {tuple(rows.shape)}, N must be a multiple of 32 and D of 4")
    rows = rows.detach().float()
    scale = rows.abs().amax(-1, keepdim=True) / 127
    whole = (rows / scale).nan_to_num(0, 0, 0).round().clamp(-127, 127)
    off = (rows.double() - whole.double() * scale.double()).norm(dim=-1, keepdim=True)
    length = rows.double().norm(dim=-1, keepdim=True)
    sums = 128 * whole.sum(-1, keepdim=True)
    more = 1 + 2**-20  # than float32 rounds down
    in_bytes = whole.to(torch.int8).contiguous().view(torch.float32)
    parts = in_bytes, scale, sums, (off * more).float(), (length * more).float(), rows
    blocks = [part.reshape(batch, count // 32, -1) for part in parts]
    return torch.cat(blocks, -1).view(torch.uint8).view(batch, count, 5 * depth + 16)


def without_bytes(keys: Tensor) -> Tensor:
    """What `bytes_before_blocks` was given."""
    batch, count, width = keys.shape
    depth = (width - 16) // 5
    blocks = keys.reshape(batch, count // 32, 32 * width).view(torch.float32)
    return blocks[..., -32 * depth :].reshape(batch, count, depth)


# ---- either --------------------------------------------------------------------------------------------


def pack_keys(rows: Tensor) -> Tensor:
    """Keys (B, N, D) float32, N and D multiples of 32, as `retrieve_packed` takes them: `packed_width` wide.

    Any whole 32s of keys can be written in the place of others.
    """
    return bytes_before_blocks(rows) if screening_runs() else to_tiles(rows)


def unpack_keys(keys: Tensor) -> Tensor:
    """What `pack_keys` was given, within 2^-17 of it."""
    return without_bytes(keys) if keys.dtype == torch.uint8 else from_tiles(keys)


def retrieve_packed_reference(
    query: Tensor, keys: Tensor, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification of `retrieve_packed`; that leaves out the products of two second parts."""
    return retrieve_reference(query, unpack_keys(keys), k, valid)


def retrieve_packed(
    query: Tensor,  # (B, M, D)
    keys: Tensor,  # (B, N, width), see packed_width
    k: int,
    *,
    valid: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.retrieve` over what `pack_keys` gave, where `tiles_run` or `screening_runs`; without gradients.

    Args:
        query: (B, M, D) float32, D a multiple of 32 up to 512.
        keys: N a multiple of 32, keys without gaps between them.
        k: columns to return, 1 to 32.
        valid: how many leading keys exist, None (all), an int, or an int32 tensor (B,); with AMX multiples
            of 32.

    Returns:
        scores (B, M, k) float32 and indices (B, M, k) int32, as retrieve. Without AMX the set is an exact
        top-k of the float32 logits, and the scores are exact to a factor that all of a query's have in
        common: in the softmax's denominator the keys that cannot be among the k best keep the logit of their
        bytes. Of rows of length 1 and D = 256 whose largest numbers are a quarter that is off by about 0.001
        |query| |key|, by thirty times that at the very most; scores over their sum are as exact as
        retrieve's. Of equal keys the smaller index need not come first.

    Raises:
        ValueError: for valid, or where the C++ extension is not there.
        RuntimeError: naming another argument, or where the processor has no such instructions.
    """
    check_backend("cpu", query.device.type)
    if keys.dtype not in (torch.uint8, torch.bfloat16):
        raise ValueError(f"keys: are {keys.dtype}, they must be what pack_keys gives")
    if valid is not None and not isinstance(valid, Tensor):
        count, valid = int(valid), None
        if not 0 <= count <= keys.shape[1]:
            raise ValueError(f"valid: is {count}, it must be 0..{keys.shape[1]}, the number of keys")
        if keys.dtype == torch.uint8:  # blocks that may be cut anywhere
            valid = keys.new_full((len(keys),), count, dtype=torch.int32)
        else:
            keys = keys[:, :count]
    if keys.shape[1] == 0:
        return retrieve_packed_reference(query, keys, k, valid)
    if keys.dtype == torch.uint8:
        rows = keys.view(torch.float32)
        return torch.ops.dmv_fast.retrieve_screened_cpu.default(query.contiguous(), rows, k, valid)
    return torch.ops.dmv_fast.retrieve_split_cpu.default(parts_in_a_row(query), keys, k, valid)
