"""One connection: the channel, and how blobs go over it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import grpc

from hansa.client.outbox import Entry, Outbox
from hansa.core.trust import channel_credentials, insecure_channel
from hansa.core.wire import INLINE, NAME, OPTIONS, PIECE
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import AgentsStub

T = TypeVar("T")

_AGAIN = {  # worth another try; everything else is an answer
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_OPTIONS = (
    *OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # which also is how long a connection may take to be made
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
)


class Later(Exception):
    """It did not work now and may work later."""


class _Damaged(Later):
    """What was sent did not arrive as it was announced."""


class Gone(Exception):
    """The coordinator refused for good: the job is over, or what was sent can never be right."""


class Link:
    """A connection to a coordinator, over ``channel``.

    Parameters
    ----------
    identity: folder of key and certificate, read at every connection; without it insecure, on this machine
        only, and the agent says its name itself.
    """

    def __init__(self, address: str, identity: Path | None, name: str) -> None:
        if identity is None:
            self.channel = insecure_channel(address, options=_OPTIONS)
        else:
            credentials = channel_credentials(identity)
            self.channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self._metadata = ((NAME, name),) if identity is None else None
        self._stub = AgentsStub(self.channel)
        self._calls: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._closed = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self.channel.close()

    async def _while_open(self, call: Coroutine[Any, Any, T]) -> T:
        """A call, which ends with the connection.

        That is not left to gRPC: to write into a call that was cancelled before its headers were sent waits
        for ever (grpcio 1.81).
        """
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        if self._closed:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError as error:
            waiting = asyncio.current_task()
            if self._closed and waiting is not None and not waiting.cancelling():
                raise Later("the connection was closed") from error
            raise

    def attend(self) -> Any:
        """The stream of an agent that is there."""
        return self._stub.Attend(metadata=self._metadata)

    async def download(self, lease: bytes, blob: pb.Blob) -> bytes:
        """A recipe or a model.

        Raises
        ------
        Gone
            When the job is over.
        Later
            When it did not work now.
        """
        return await self._while_open(self._download(lease, blob))

    async def _download(self, lease: bytes, blob: pb.Blob) -> bytes:
        parts: list[bytes] = []
        have = 0
        wanted = pb.Wanted(lease=lease, digest=blob.digest)
        try:
            async for piece in self._stub.Download(wanted, metadata=self._metadata):
                have += len(piece.data)
                if have > blob.size:
                    break
                parts.append(piece.data)
        except grpc.aio.AioRpcError as error:
            _raise(error.code(), error.details(), error)
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != blob.digest:
            raise Gone("what the coordinator sent is not what it announced")
        return data

    async def upload(self, outbox: Outbox, entry: Entry) -> bool:
        """Send an update; returns whether it counts.

        Raises
        ------
        Gone
            When it never will.
        Later
            When it did not work now.
        """
        try:
            return await self._while_open(self._upload(outbox, entry))
        except _Damaged as error:
            if outbox.whole(entry):
                raise
            raise Gone("the update that waited here was damaged on this machine's disk") from error

    async def _upload(self, outbox: Outbox, entry: Entry) -> bool:
        call = self._stub.Upload(metadata=self._metadata)
        inline = outbox.read(entry, 0, entry.size) if entry.size <= INLINE else b""
        manifest = pb.Manifest(
            lease=bytes.fromhex(entry.lease),
            update=pb.Blob(digest=entry.digest, size=entry.size, data=inline),
            tensors=entry.infos(),
            examples=entry.examples,
            steps=entry.steps,
            loss=entry.loss or 0.0,
            has_loss=entry.loss is not None,
            seconds=entry.seconds,
        )
        try:
            await call.write(pb.UploadRequest(manifest=manifest))
            reply = await call.read()
            if reply is not grpc.aio.EOF and reply.WhichOneof("body") == "permit":
                for offset in range(reply.permit.offset, entry.size, PIECE):
                    data = outbox.read(entry, offset, PIECE)
                    await call.write(pb.UploadRequest(piece=pb.Piece(offset=offset, data=data)))
                await call.done_writing()
                reply = await call.read()
            if reply is grpc.aio.EOF:
                _raise(await call.code(), await call.details(), None)
            return bool(reply.acknowledgement.counted)
        except grpc.aio.AioRpcError as error:
            _raise(error.code(), error.details(), error)
        except asyncio.InvalidStateError as error:  # it ended while we wrote
            _raise(await call.code(), await call.details(), error)
        finally:
            call.cancel()


def _raise(code: grpc.StatusCode, details: str | None, cause: BaseException | None) -> NoReturn:
    if code is grpc.StatusCode.DATA_LOSS:
        raise _Damaged(f"{code.name}: {details}") from cause
    if code in _AGAIN or code is grpc.StatusCode.OK:
        raise Later(f"{code.name}: {details}") from cause
    raise Gone(f"{code.name}: {details}") from cause
