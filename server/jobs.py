"""Jobs that are out, and how a snapshot keeps them: payloads by their digests, whatever shares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hansa.core.trees import Tree
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import Packed


@dataclass
class Open:
    """A job that was sent and is not yet folded, thrown away or lost.

    Attributes
    ----------
    packed: what the client receives.
    expected: tensors of the update that it shall send.
    recalled: it was asked for what it has.
    update: digest of the update, once it has arrived. tree: its tensors, while they are still in memory.
    """

    client: int
    number: int
    phase: str
    keys: frozenset[str] | None
    packed: Packed
    expected: tuple[TensorInfo, ...]
    sent: float
    recalled: bool = False
    update: str | None = None
    tree: Tree | None = None
    examples: int = 0
    steps: int = 0
    loss: float | None = None

    def facts(self) -> dict[str, Any]:
        """For :func:`restored`, as JSON holds it, without the payload and the update."""
        facts = {name: value for name, value in vars(self).items() if name != "tree"}
        facts["packed"], facts["expected"] = named(self.packed), plain(self.expected)
        facts["keys"] = None if self.keys is None else sorted(self.keys)
        return facts


def restored(facts: Mapping[str, Any], payload: Callable[[Sequence[Any]], Packed]) -> Open:
    """The job that told these facts; ``payload`` finds what :func:`named` named."""
    keys = None if facts["keys"] is None else frozenset(facts["keys"])
    found = {"packed": payload(facts["packed"]), "expected": infos(facts["expected"]), "keys": keys}
    return Open(**{**facts, **found})


def named(packed: Packed) -> list[Any]:
    """What a payload is, without its bytes."""
    return [packed.digest, plain(packed.tensors)]


class Payloads:
    """Payloads by what :func:`named` says of them, one copy of each; ``data`` gives their bytes."""

    def __init__(self, data: Callable[[str], bytes]) -> None:
        self._data, self._known = data, dict[str, Packed]()

    def __call__(self, name: Sequence[Any]) -> Packed:
        """One."""
        digest, tensors = name
        if digest not in self._known:
            self._known[digest] = Packed(self._data(digest), digest, infos(tensors))
        return self._known[digest]


def plain(tensors: Sequence[TensorInfo]) -> list[list[Any]]:
    """Tensors' descriptions, as JSON holds them."""
    return [[each.name, each.dtype, list(each.shape)] for each in tensors]


def infos(told: Sequence[Sequence[Any]]) -> tuple[TensorInfo, ...]:
    """The descriptions that :func:`plain` told."""
    return tuple(TensorInfo(name=name, dtype=dtype, shape=shape) for name, dtype, shape in told)
