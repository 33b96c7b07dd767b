"""Trees as bytes: safetensors, checked against what was agreed before anything is made of them.

A tree that is packed twice gives the same bytes, so its digest names it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

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
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}
_HEADER_LIMIT = 16 << 20
_START = 64 << 10
"""Bytes of a file that are read before it is mapped: what a map lacks is fetched with Python's lock held."""


Bytes = NDArray[np.uint8]


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


def unpack(data: bytes | Bytes, tensors: Sequence[TensorInfo]) -> Tree:
    """The tree, in the order of ``tensors``; of an array, its tensors lie in it.

    Raises
    ------
    Malformed
        When the bytes are no safetensors file of exactly these tensors, or a number is not finite.
    """
    tree = view(np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data, tensors)
    for name, each in tree.items():
        if each.is_floating_point() and not _finite(each):
            raise Malformed(f"tensor {name!r} has numbers that are not finite")
    return tree


def unpack_file(path: Path, tensors: Sequence[TensorInfo]) -> Tree:
    """:func:`unpack` of a file, which is mapped and not read into memory first."""
    if not path.stat().st_size:
        raise Malformed("no safetensors file: it is empty")
    with path.open("rb") as file:
        file.read(_START)
    return unpack(np.memmap(path, np.uint8, mode="c"), tensors)


def view(data: Bytes, tensors: Sequence[TensorInfo]) -> Tree:
    """:func:`unpack` of what is known to be finite.

    The format is safetensors: eight bytes tell the length of a header in JSON, and the header each tensor's
    type, shape, and place in what follows. Here the tensors must fill that without a gap, each where its type
    may lie, and the header may have nothing else.
    """
    header, begin = _header(data)
    found = [_info(name, entry) for name, entry in header.items()]
    require_alike(found, tensors)
    placed, free = {}, begin
    for info, (start, end) in sorted(
        ((i, header[i.name]["data_offsets"]) for i in found), key=lambda p: p[1]
    ):
        dtype, size = _TYPES[info.dtype], end - start
        right = size == math.prod(info.shape) * dtype.itemsize and free % dtype.itemsize == 0
        if not right or begin + start != free or free + size > len(data):
            raise Malformed(f"tensor {info.name!r} lies where it cannot be")
        placed[info.name] = (
            torch.frombuffer(data, dtype=dtype, count=math.prod(info.shape), offset=free)
            if size
            else torch.empty(0, dtype=dtype)
        ).view(list(info.shape))
        free += size
    if free != len(data):
        raise Malformed("there is more than tensors")
    return {each.name: placed[each.name] for each in tensors}


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are: the least and the greatest tell, and NaN is either.

    By NumPy where it can: its threads would be torch's, for each of many threads that look at an update.
    """
    if tensor.numel() == 0:
        return True
    if tensor.itemsize < 4:
        return all(math.isfinite(float(end)) for end in tensor.aminmax())
    values = tensor.numpy()
    return math.isfinite(values.min()) and math.isfinite(values.max())


def _header(data: Bytes) -> tuple[dict[str, Any], int]:
    """A file's header, and where what follows it begins.

    No key may be there twice, which JSON readers resolve each in their own way, and no metadata on the side.
    """
    size = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or size > min(len(data) - 8, _HEADER_LIMIT):
        raise Malformed("no safetensors file: its header is longer than the file")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise Malformed("a key of the header is there twice")
        return made

    try:
        header = json.loads(data[8 : 8 + size].tobytes(), object_pairs_hook=once)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed("no safetensors file: its header is no JSON") from error
    if not isinstance(header, dict) or "__metadata__" in header:
        raise Malformed("the header has more than tensors")
    return header, 8 + size


def _info(name: str, entry: Any) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end], **rest} if (
            not rest
            and dtype in _TYPES
            and all(type(each) is int and 0 <= each < 2**63 for each in (*shape, start, end))
        ):
            return TensorInfo(name=name, dtype=dtype, shape=shape)
    raise Malformed(f"no safetensors file: its header's {name[:80]!r} is no tensor")
