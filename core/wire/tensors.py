"""Trees as bytes: safetensors, checked against what was agreed before anything is made of them.

A tree that is packed twice gives the same bytes, so its digest names it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from hansa.core.trees import Tree
from hansa.core.wire.federation_pb2 import TensorInfo

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_LIMIT = 16 << 20


class Malformed(ValueError):
    """Bytes or a manifest that are not what was agreed."""


@dataclass(frozen=True)
class Packed:
    """A tree as it travels: its bytes, their SHA-256, and its tensors in the tree's order."""

    data: bytes
    digest: str
    tensors: tuple[TensorInfo, ...]


def pack(tree: Mapping[str, torch.Tensor]) -> Packed:
    """A tree as bytes."""
    own = {
        name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in tree.items()
    }
    data = save(own)
    return Packed(data, hashlib.sha256(data).hexdigest(), describe(tree))


def describe(tree: Mapping[str, torch.Tensor]) -> tuple[TensorInfo, ...]:
    """Names, types and shapes, in the tree's order."""
    return tuple(TensorInfo(name=n, dtype=_DTYPES[t.dtype], shape=list(t.shape)) for n, t in tree.items())


def require_alike(found: Sequence[TensorInfo], wanted: Sequence[TensorInfo]) -> None:
    """Refuse tensors that are not exactly those wanted, in any order.

    Raises
    ------
    Malformed
        Naming the first difference.
    """
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise Malformed("a tensor is there twice")
    have = {each.name: each for each in found}
    for each in wanted:
        if each.name not in have:
            raise Malformed(f"tensor {each.name!r} is missing")
        other = have.pop(each.name)
        if other.dtype != each.dtype:
            raise Malformed(f"tensor {each.name!r} is {other.dtype[:8]} and should be {each.dtype}")
        if list(other.shape) != list(each.shape):
            raise Malformed(f"tensor {each.name!r} has shape {list(other.shape)[:8]}, not {list(each.shape)}")
    if have:
        raise Malformed(f"there are {len(have)} tensors that nobody asked for, as {next(iter(have))[:80]!r}")


def size_limit(tensors: Sequence[TensorInfo]) -> int:
    """More bytes than a file of these tensors can have."""
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    payload = sum(widths.get(each.dtype, 1) * math.prod(each.shape) for each in tensors)
    header = sum(160 + 8 * len(each.name.encode()) + 24 * len(each.shape) for each in tensors)
    return payload + header + 1024


def unpack(data: bytes, tensors: Sequence[TensorInfo]) -> Tree:
    """The tree, in the order of ``tensors``.

    Raises
    ------
    Malformed
        When the bytes are no safetensors file of exactly these tensors, or a number is not finite.
    """
    _require_plain_header(io.BytesIO(data), len(data))
    return _checked(lambda: load(data), tensors)


def unpack_file(path: Path, tensors: Sequence[TensorInfo]) -> Tree:
    """:func:`unpack` of a file, which is mapped and not read into memory first."""
    with path.open("rb") as file:
        _require_plain_header(file, path.stat().st_size)
    return _checked(lambda: load_file(path), tensors)


def _checked(read: Callable[[], Tree], tensors: Sequence[TensorInfo]) -> Tree:
    try:
        tree = read()
    except (SafetensorError, ValueError, OverflowError, RuntimeError, KeyError) as error:
        raise Malformed(f"no safetensors file: {error}") from error
    try:
        require_alike(describe(tree), tensors)
    except KeyError as error:
        raise Malformed(f"a tensor is of type {error}") from error
    for name, each in tree.items():
        if each.is_floating_point() and not _finite(each):
            raise Malformed(f"tensor {name!r} has numbers that are not finite")
    return {each.name: tree[each.name] for each in tensors}


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are: the least and the greatest tell, and NaN is either. One pass, nothing kept."""
    return tensor.numel() == 0 or all(math.isfinite(float(end)) for end in tensor.aminmax())


def _require_plain_header(file: BinaryIO, total: int) -> None:
    """No duplicate keys, which JSON readers resolve each in their own way, and no metadata on the side."""
    size = int.from_bytes(file.read(8), "little")
    if total < 8 or size > min(total - 8, _HEADER_LIMIT):
        raise Malformed("no safetensors file: its header is longer than the file")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise Malformed("a key of the header is there twice")
        return made

    try:
        header = json.loads(file.read(size), object_pairs_hook=once)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed("no safetensors file: its header is no JSON") from error
    if not isinstance(header, dict) or "__metadata__" in header:
        raise Malformed("the header has more than tensors")
