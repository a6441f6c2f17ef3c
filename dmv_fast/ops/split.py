"""float32 numbers as two of bfloat16, and retrieval over keys of such (csrc/retrieve_amx.cpp).

v = v_0 + v_1 with an error of 2^-17 v; a product of two is three of the four products of their parts,
a_1 b_0 + a_0 b_0 + a_0 b_1, which matrix units for bfloat16 take far less time for than float32 takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmv_fast.ops.backends import check_backend
from dmv_fast.ops.retrieve import retrieve_reference


def bfloat16_parts(x: Tensor) -> Tensor:
    """float32 (...) -> (2, ...) bfloat16; the second is what the first, rounded, leaves."""
    x = x.detach().float()
    first = x.bfloat16()
    return torch.stack([first, (x - first.float()).bfloat16()])


def split_rows(rows: Tensor) -> Tensor:
    """Queries (B, M, D) float32, of any stride -> (B, M, 2 D) bfloat16: first parts, then second ones."""
    return torch.cat(bfloat16_parts(rows).unbind(0), -1)


def split_keys(rows: Tensor) -> Tensor:
    """Keys (B, N, D) float32, N a multiple of 16, D of 32 -> (B, N, 2 D) bfloat16 in tiles.

    16 keys lie together as (D / 32, 2 parts, 16, 32): what the matrix unit takes at once is one piece of
    memory. Any whole 16s of keys can be written in the place of others.
    """
    batch, count, depth = rows.shape
    tiles = bfloat16_parts(rows).view(2, batch, count // 16, 16, depth // 32, 32)
    return tiles.permute(1, 2, 4, 0, 3, 5).reshape(batch, count, 2 * depth)


def join_keys(keys: Tensor) -> Tensor:
    """What `split_keys` was given, within 2^-17 of it."""
    batch, count, width = keys.shape
    tiles = keys.float().view(batch, count // 16, width // 64, 2, 16, 32).sum(3)
    return tiles.transpose(2, 3).reshape(batch, count, width // 2)


def retrieve_split_reference(
    query: Tensor, keys: Tensor, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification of `retrieve_split`; that leaves out the products of two second parts."""
    first, second = query.float().chunk(2, -1)
    return retrieve_reference(first + second, join_keys(keys), k, valid)


def retrieve_split(
    query: Tensor,  # (B, M, 2 D)
    keys: Tensor,  # (B, N, 2 D)
    k: int,
    *,
    valid: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.retrieve` over what `split_rows` and `split_keys` gave, on a CPU with AMX; without gradients.

    query, keys: (B, M, 2 D) and (B, N, 2 D) bfloat16, D a multiple of 32 up to 512, N of 32; k: 1 to 32.
    valid: how many leading keys exist, None (all), an int, or an int32 tensor (B,), multiples of 32. Returns
    scores (B, M, k) float32 and indices (B, M, k) int32, as retrieve.

    Raises ValueError for valid or where the C++ extension is not there, RuntimeError naming another argument
    or where the processor has no AMX.
    """
    check_backend("cpu", query.device.type)
    if isinstance(valid, int):
        if not 0 <= valid <= keys.shape[1]:
            raise ValueError(f"valid: is {valid}, it should be 0..{keys.shape[1]}, the number of keys")
        keys, valid = keys[:, :valid], None
    if keys.shape[1] == 0:
        return retrieve_split_reference(query, keys, k, valid)
    return torch.ops.dmv_fast.retrieve_split_cpu.default(query, keys, k, valid)
