"""A coordinator process: configuration, start, drain, end.

::

    <data>/events.db      the event log, unless it is in another database
    <data>/artefacts/     updates, and the newest snapshot of every run that goes on
    <data>/lock           held by the one process that leads here
    <data>/address        where it listens
    <data>/metrics        where Prometheus finds it, if it may
    <runs>/<run id>/      run directories, as the simulator writes them
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from hansa.core.errors import InputError, RunError
from hansa.core.recipe import construct
from hansa.core.wire import OPTIONS, enrolment_pb2_grpc, federation_pb2
from hansa.core.wire.federation_pb2_grpc import add_AgentsServicer_to_server, add_ControlServicer_to_server
from hansa.server.agents import Agents
from hansa.server.artefacts import Artefacts
from hansa.server.control import Control
from hansa.server.events import EventLog
from hansa.server.figures import FIGURES, Condition
from hansa.server.limits import Limits
from hansa.server.office import Office
from hansa.server.patience import Over
from hansa.server.pieces import Pieces
from hansa.server.roster import Roster
from hansa.server.trust import (
    RULES,
    Authority,
    Guard,
    RefusalLog,
    Renewal,
    enrolment_server,
    insecure_port,
    server_credentials,
)

_PKI = Path("pki")  # where `hansa pki init` puts the authority
_DRAIN = 5.0  # seconds for calls under way when the coordinator ends

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a coordinator is told.

    Attributes
    ----------
    listen: host:port for agents and users; port 0 takes a free one.
    data: folder of the event log and the artefacts.
    runs: folder of run directories.
    database: SQLAlchemy URL of the event log; SQLite in ``data`` by default.
    pki: folder of the federation's authority (`hansa pki init`); without it insecure, on loopback only.
    enrolment: host:port where machines with a join token get their certificates.
    metrics: host:port for Prometheus, or nothing.
    code: objects that recipes may import, as ``package.module:Class``.
    sources: folders whose files recipes may read here, and data sets of the hub; sites read their own.
    rpcs: calls at a time, streams included.
    """

    listen: str = "127.0.0.1:8443"
    data: Path = Path("coordinator")
    runs: Path = Path("runs")
    database: str | None = None
    pki: Path | None = None
    enrolment: str | None = None
    metrics: str | None = None
    code: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    rpcs: int = 5000
    limits: Limits = field(default_factory=Limits)


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """A configuration from a TOML file, with overrides; an authority in the folder ``pki`` here is used.

    Raises
    ------
    InputError
        Naming the key, its value and the remedy.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            why = f"it cannot be read ({error.strerror})"
            raise InputError("--config", str(path), why, "name the coordinator's configuration") from error
        except ValueError as error:
            raise InputError(
                "--config", str(path), f"it is not TOML: {error}", "correct that line"
            ) from error
    raw |= {key: value for key, value in overrides.items() if value is not None}
    if "pki" not in raw and (_PKI / "authority.key").is_file():
        raw["pki"] = _PKI
    if raw.get("pki") is not None:
        raw = {"listen": "0.0.0.0:8443", "enrolment": "0.0.0.0:8444", **raw}
    limits = construct(Limits, raw.pop("limits", {}), section="limits")
    return construct(Config, raw, section="coordinator", fixed={"limits": limits})


@asynccontextmanager
async def coordinator(config: Config, *, over: Callable[[Over], None] = lambda _: None) -> AsyncIterator[int]:
    """A coordinator that serves as long as the context lasts, on the port that is given.

    ``over`` is called when this process may write no more; it can only end then.

    Raises
    ------
    InputError
        When it would be insecure beyond this machine, or cannot listen there.
    RunError
        When another coordinator leads here, or the event log cannot be opened.
    TrustError
        When the authority's folder cannot be used.
    """
    authority = Authority(config.pki) if config.pki is not None else None
    lock = _lead(config.data, config.runs)
    artefacts = Artefacts(config.data / "artefacts")
    url = config.database or f"sqlite:///{(config.data / 'events.db').absolute()}"
    try:
        log = EventLog(url, before=artefacts.settle, over=over)
    except BaseException:
        os.close(lock)
        raise
    limits = config.limits
    roster = Roster(denied=authority.denied.reason) if authority is not None else Roster()
    office = Office(
        log,
        artefacts,
        config.runs,
        grace=limits.grace,
        code=config.code,
        sources=config.sources,
        roster=roster,
        largest=limits.update,
    )
    guard = (
        Guard(RULES, None, insecure=True, most=limits.calls)
        if authority is None
        else Guard(RULES, authority.denied, on_refused=RefusalLog(authority.audit), most=limits.calls)
    )
    server = grpc.aio.server(
        interceptors=(guard, Pieces()), options=OPTIONS, maximum_concurrent_rpcs=config.rpcs
    )
    agents = Agents(office, limits)

    def gauges(sample: federation_pb2.Sample) -> None:
        office.gauge(sample)
        agents.gauge(sample)

    condition = Condition(
        gauges, lambda: (each.status for each in office.runs()), secure=authority is not None
    )
    add_AgentsServicer_to_server(agents, server)
    add_ControlServicer_to_server(Control(office, config.runs, condition), server)
    if authority is not None:
        enrolment_pb2_grpc.add_RenewalServicer_to_server(Renewal(authority), server)
    state = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - lazily made
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    names = [each.full_name for each in federation_pb2.DESCRIPTOR.services_by_name.values()]
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = _bind(server, config.listen, authority)
    enrolling: grpc.aio.Server | None = None
    if authority is not None and config.enrolment:
        enrolling, _ = enrolment_server(authority, config.enrolment)
        await enrolling.start()
    await office.recover()
    await server.start()
    metrics = _metrics(config)  # whoever can read them knows that it serves
    await state.set("", health_pb2.HealthCheckResponse.SERVING)
    host = config.listen.rpartition(":")[0]
    announced = config.data / "address"
    announced.with_suffix(".part").write_text(f"{host}:{port}")
    announced.with_suffix(".part").replace(announced)  # whoever waits for it never reads half
    _log.info("listening", port=port, epoch=log.epoch, secure=authority is not None)
    watching = asyncio.create_task(condition.watch(), name="samples")
    try:
        with condition.published():
            yield port
    finally:
        watching.cancel()
        await state.enter_graceful_shutdown()
        office.drain()
        await server.stop(_DRAIN)
        if enrolling is not None:
            await enrolling.stop(None)
        await office.close()
        await log.stop()
        log.close()
        if metrics is not None:
            metrics.shutdown()
            metrics.server_close()
        if authority is not None:
            authority.close()
        os.close(lock)
        _log.info("ended")


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises
    ------
    Over
        When this process may write no more: another coordinator has taken over, or the disk failed.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Over | None] = loop.create_future()

    def end(why: Over | None = None) -> None:
        if not ended.done():
            ended.set_result(why)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    gc.freeze()  # what is there now stays, and is not looked at again
    async with coordinator(config, over=end):
        why = await ended
        if why is not None:
            raise why


def _lead(folder: Path, runs: Path) -> int:
    """Take the lock of a data folder; what is made here is for its owner's eyes, for it holds models."""
    try:
        for each in (runs, folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"{folder}: it cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError(f"{folder}: another coordinator leads here; stop it first") from None
    return descriptor


def _bind(server: grpc.aio.Server, listen: str, authority: Authority | None) -> int:
    try:
        if authority is None:
            return insecure_port(server, listen)
        return server.add_secure_port(listen, server_credentials(authority))
    except RuntimeError as error:
        raise InputError(
            "coordinator.listen", listen, "nothing can listen there", "use another port"
        ) from error


def _metrics(config: Config) -> Any:
    if config.metrics is None:
        return None
    host, _, port = config.metrics.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host or "127.0.0.1", FIGURES.registry)
    except (OSError, ValueError) as error:
        raise InputError(
            "coordinator.metrics", config.metrics, f"{error}", "use another host:port"
        ) from error
    (config.data / "metrics").write_text(f"{host or '127.0.0.1'}:{server.server_port}")
    return server
