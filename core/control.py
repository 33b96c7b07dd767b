"""What a user's program asks of a coordinator: submit, watch, stop, resume, list, fetch the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from hansa.core.errors import HansaError, InputError, RunError, TrustError
from hansa.core.trust import channel_credentials, check_loopback, explain_member
from hansa.core.wire import OPTIONS
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import ControlStub


class Coordinator:
    """A coordinator at ``host:port``, called with the certificate in the folder ``identity``, if given.

    It has ``patience`` seconds to answer. Every method raises :class:`~hansa.core.errors.HansaError` with the
    coordinator's own sentence; ``option`` is what the user named it by.
    """

    def __init__(
        self, address: str, identity: Path | None = None, *, patience: float = 20.0, option: str = "--on"
    ) -> None:
        self.address, self._identity, self._patience = address, identity, patience
        self._option = option
        self._remedy = "start one: `hansa coordinator start`"
        if identity is None:
            self._remedy += "; if it goes by certificates, name the folder of yours in HANSA_IDENTITY"
            check_loopback(
                option,
                address,
                "use 127.0.0.1:PORT, or name the folder of your certificate in HANSA_IDENTITY",
            )
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            credentials = channel_credentials(identity)
            self._channel = grpc.secure_channel(address, credentials, options=OPTIONS)
        self._stub = ControlStub(self._channel)

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()

    def submit(self, recipe: str, *, wait_for: int = 0, key: str = "") -> pb.RunStatus:
        """Start a run of a recipe (TOML); the same ``key`` starts it once."""
        with self._explained():
            submission = pb.Submission(recipe=recipe, wait_for=wait_for, key=key)
            status: pb.RunStatus = self._stub.Submit(submission, timeout=self._patience, wait_for_ready=True)
            return status

    def watch(self, run: str, after: int = 0) -> Iterator[pb.Happening]:
        """Rounds after ``after`` as they are made, then the end. Goes on where a connection was lost."""
        while True:
            try:
                request = pb.WatchRequest(id=run, after=after)
                for happening in self._stub.Watch(request, wait_for_ready=True):
                    yield happening
                    if happening.WhichOneof("body") == "end":
                        return
                    after = happening.round.index
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise self._explain(error) from error

    def list(self) -> list[pb.RunStatus]:
        """All runs, the oldest first."""
        with self._explained():
            return list(self._stub.List(pb.ListRequest(), timeout=self._patience, wait_for_ready=True).runs)

    def stop(self, run: str) -> pb.RunStatus:
        """Interrupt a run."""
        with self._explained():
            status: pb.RunStatus = self._stub.Stop(
                pb.RunName(id=run), timeout=self._patience, wait_for_ready=True
            )
            return status

    def resume(self, run: str) -> pb.RunStatus:
        """Go on with an interrupted run."""
        with self._explained():
            status: pb.RunStatus = self._stub.Resume(
                pb.RunName(id=run), timeout=self._patience, wait_for_ready=True
            )
            return status

    def ask(self, question: str, run: str, **arguments: Any) -> Any:
        """What a run, or with an empty name the coordinator itself, answers (:mod:`hansa.core.questions`)."""
        with self._explained():
            put = pb.Question(run=run, name=question, arguments=json.dumps(arguments))
            return json.loads(self._stub.Ask(put, timeout=self._patience, wait_for_ready=True).json)

    def model(self, run: str) -> bytes:
        """The final model of a run, or its newest, as safetensors."""
        with self._explained():
            return b"".join(piece.data for piece in self._stub.Model(pb.RunName(id=run)))

    def roster(self) -> tuple[pb.AgentStatus, ...]:
        """The agents that are here, and those that were since the coordinator started, by name."""
        with self._explained():
            return tuple(self._stub.Roster(pb.RosterRequest(), timeout=self._patience))

    def condition(self, after: float = 0.0) -> pb.ConditionReply:
        """How the coordinator stands; samples later than ``after``, in seconds since 1970."""
        with self._explained():
            reply: pb.ConditionReply = self._stub.Condition(
                pb.ConditionRequest(after=after), timeout=self._patience
            )
            return reply

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.RpcError) -> HansaError:
        code, details = error.code(), error.details() or ""
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            if self._identity is not None and (why := explain_member(self.address, self._identity)):
                return TrustError(why)
            return InputError(
                self._option,
                self.address,
                f"no coordinator answers ({details})",
                self._remedy,
            )
        return RunError(f"{self.address}: {details}")
