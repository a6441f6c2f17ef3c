"""Checkpoints: where they are, how they are checked, how they become a network.

A checkpoint is one safetensors file; its metadata holds the network's configuration as JSON, so that it
needs no second file to be loaded. Those with a name, where they are and their sha256: `places.py`; each has
a model card NAME.md beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmv_fast.files import replaced_when_complete
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.weights.places import CheckpointError, cache_folder, check, find, known, sha256

__all__ = [
    "CheckpointError", "cache_folder", "find", "known", "load_model", "load_pretrained", "save_model",
    "sha256",
]  # fmt: skip

_CONFIG_KEY = "dmv_fast.config"
_STEM = ("conv1", "bn1", "layer1", "layer2", "layer3")


def load_model(
    name_or_path: str | os.PathLike[str], *, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, k: int | None = None,
) -> DMV:  # fmt: skip
    """A checkpoint as a network in evaluation mode.

    Args:
        name_or_path: a name (see `known`) or a .safetensors file that `save_model` wrote.
        k: candidates K, 1..32, instead of the checkpoint's own.

    Raises:
        CheckpointError: (a ValueError) not found, truncated, not a DMV checkpoint, sha256 does not match.
    """
    path = find(name_or_path)
    check(path)
    tensors, config = _read(path)
    if k is not None:
        config = {**config, "candidates": k}
    model = DMV(_to_config(path, config))
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"weights {path}: do not fit the network they name: {first}") from None
    return model.eval().requires_grad_(False).to(device=device, dtype=dtype)


def save_model(model: DMV, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16) -> str:
    """Write a checkpoint (atomically); returns its sha256. Batch-norm statistics keep float32.

    In float16 the convolutions' weights are rounded to 8 bits, as bfloat16 has: float32 times such takes two
    products in bfloat16, others take three (runtime/convolution.py). Training in bfloat16 sees only such.
    """
    path = Path(path)
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in model.state_dict().items()}
    try:
        with replaced_when_complete(path) as partial:
            save_file(tensors, partial, metadata={_CONFIG_KEY: json.dumps(asdict(model.config))})
            partial.chmod(0o644)  # safetensors makes files for their owner alone; this is there to be shared
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written, is the disk full? ({error})") from error
    return sha256(path)


def load_pretrained(model: DMV, path: str | os.PathLike[str]) -> None:
    """Fill conv1 to layer3 of the backbone from an ImageNet file with torchvision's key names."""
    path = Path(path)
    tensors, _ = _read(path, want_config=False)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    try:
        missing, unexpected = model.backbone.load_state_dict(weights, strict=False)
    except RuntimeError:
        missing, unexpected = [], ["other shapes"]
    lost = [n for n in missing if n.startswith(_STEM) and not n.endswith("num_batches_tracked")]
    if lost or unexpected:
        wrong = (lost + unexpected)[:3]
        raise CheckpointError(f"weights {path}: do not fit {model.config.backbone}: {wrong}")


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    keep = not tensor.is_floating_point() or "running_" in name or tensor.ndim == 0
    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 4 and dtype == torch.float16:
        tensor = tensor.bfloat16().float()
    return tensor.to(tensor.dtype if keep else dtype)


def _read(path: Path, *, want_config: bool = True) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights {path}: not a readable safetensors file ({error})") from None
    if not want_config:
        return tensors, {}
    if _CONFIG_KEY not in metadata:
        raise CheckpointError(f"weights {path}: not a dmv_fast checkpoint (no {_CONFIG_KEY} in its metadata)")
    return tensors, json.loads(metadata[_CONFIG_KEY])


def _to_config(path: Path, config: dict) -> DMVConfig:
    unknown = set(config) - {field.name for field in fields(DMVConfig)}
    if unknown:
        raise CheckpointError(
            f"weights {path}: made by a newer dmv_fast (unknown settings {sorted(unknown)})"
        )
    return DMVConfig(
        **{**config, "anchor_ratios": tuple(config.get("anchor_ratios", DMVConfig.anchor_ratios))}
    )
