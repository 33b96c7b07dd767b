"""What could keep an agent from its work, told before it joins: each problem with its remedy."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator

import grpc
import torch

from hansa.client.agent import Config
from hansa.client.session import Link
from hansa.core.data import load
from hansa.core.errors import HansaError
from hansa.core.recipe import parse
from hansa.core.trust import explain_member
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire import stranger, version

_ROOM = 1 << 30  # bytes of disk below which an outbox may not fit


def check(config: Config) -> Iterator[tuple[str, str | None]]:
    """(what was looked at, what is wrong and what to do about it, or ``None``)."""
    yield "state folder", _state(config)
    yield "device", _device(config)
    yield "precision", _precision(config)
    yield "data", _data(config)
    yield "policy", _policy(config)
    yield "coordinator", asyncio.run(_coordinator(config))


def _state(config: Config) -> str | None:
    try:
        config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = config.state / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return f"{config.state} cannot be written ({error.strerror}); correct its permissions, or set `state`"
    free = shutil.disk_usage(config.state).free
    if free < _ROOM:
        return f"{config.state} has {free >> 20} MB left; make room, or set `state` to another disk"
    if os.stat(config.state).st_mode & 0o007:
        return f"{config.state} is open to everybody; `chmod o= {config.state}`"
    return None


def _device(config: Config) -> str | None:
    try:
        torch.zeros(1, device=config.device or "cpu")
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        return f"{config.device} does not work here ({why}); set `device`, or leave it out"
    return None


def _precision(config: Config) -> str | None:
    if config.precision == "full":
        return None
    device = torch.device(config.device or "cpu")
    if device.type == "cuda":
        made_for_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        made_for_it = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    if not made_for_it:
        return f"{device} has no bf16 instructions, and would be far slower; leave out `precision`"
    return None


def _data(config: Config) -> str | None:
    if config.data is None:
        return None
    try:
        train, _ = load(parse({"data": dict(config.data)}).data, 0, alone=False)
    except HansaError as error:
        return str(error)
    return None if len(train) else "there are no examples; correct [data]"


def _policy(config: Config) -> str | None:
    for digest in (*config.policy.recipes, *config.policy.code.values()):
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            return f"{digest!r} is no SHA-256; take it from `sha256sum`"
    return None


async def _coordinator(config: Config) -> str | None:
    try:
        async with Link(config.coordinator, config.identity, config.name) as link:
            stream = link.attend()
            # Seats that no run has: the coordinator says welcome and gives no job.
            hello = pb.Hello(version=version(), seats=pb.Seats())
            await asyncio.wait_for(stream.write(pb.FromAgent(hello=hello)), 10)
            reply = await asyncio.wait_for(stream.read(), 10)
            if reply is grpc.aio.EOF:
                return f"{config.coordinator} ended the connection; see its log"
            stream.cancel()
            return stranger(reply.welcome.version)
    except TimeoutError:
        return f"{config.coordinator} does not answer; see that `coordinator` is right, and the firewalls"
    except HansaError as error:
        return str(error)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and config.identity is not None:
            why = await asyncio.to_thread(explain_member, config.coordinator, config.identity)
            if why is not None:
                return why
        return (
            f"{config.coordinator}: {error.code().name.lower().replace('_', ' ')} ({error.details()}); "
            "see that it runs, that `coordinator` is right, and that both sides use certificates or none"
        )
