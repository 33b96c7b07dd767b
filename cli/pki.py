"""``hansa pki``: who belongs to a federation. What happens is in :mod:`hansa.server.trust`."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hansa.cli.options import Json, epilog, output
from hansa.core.errors import InputError
from hansa.core.roles import Role

if TYPE_CHECKING:
    from hansa.client.enrolment import Joined
    from hansa.server.trust import Authority

pki = typer.Typer(name="pki", rich_markup_mode="rich", no_args_is_help=True)

_Pki = Annotated[
    Path,
    typer.Option(
        "--pki", envvar="HANSA_PKI", metavar="DIR", help="Folder of the authority, on the coordinator."
    ),
]
_Identity = Annotated[
    Path,
    typer.Option(
        "--identity",
        envvar="HANSA_IDENTITY",
        metavar="DIR",
        help="Folder of this machine's key and certificate.",
    ),
]
_Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        metavar="HOST",
        help="Name or address that others reach the coordinator under; may be repeated.",
    ),
]
_PKI, _IDENTITY = Path("pki"), Path("identity")


@pki.callback()
def _pki() -> None:
    """Certificates: found a federation, let machines and people in, put them out."""


@pki.command(epilog=epilog("Examples", "hansa pki init st-mary --host fl.example.org --host 10.0.0.5"))
def init(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    host: _Hosts = None,
    folder: _Pki = _PKI,
    json: Json = False,
) -> None:
    """Found the federation NAME: its authority's key, the coordinator's certificate, an audit log."""
    from hansa.server.trust import Authority

    out = output(json)
    with closing(Authority.create(folder, name, host or [])) as made:
        out.say(
            f"{folder}: the authority of {name}; {folder}/authority.key makes certificates, so back it up "
            "apart"
        )
        out.say(f"fingerprint {made.fingerprint}")
        out.envelope(folder=folder, fingerprint=made.fingerprint)


@pki.command(
    epilog=epilog(
        "Examples",
        "hansa pki issue clinic-3 --output clinic-3.token",
        "hansa pki issue ada --role researcher --expires 2h",
        "hansa pki issue root --role admin --into admin",
    )
)
def issue(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    role: Annotated[Role, typer.Option(help="What NAME may do.")] = Role.AGENT,
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="How long the token is open: 30m, 24h, 7d.")
    ] = "24h",
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default=False, help="Join at once, on this machine, into this folder."
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default=False, help="Write the token to a file."),
    ] = None,
    folder: _Pki = _PKI,
    json: Json = False,
) -> None:
    """Make a join token for NAME: it lets one machine or person in, once.

    Whoever has it can join as NAME: hand it over by a channel that both of you trust.
    """
    from hansa.core.trust.files import PRIVATE, replace
    from hansa.core.trust.identity import shown

    out = output(json)
    with closing(_authority(folder)) as authority:
        if into is not None:
            from hansa.server.trust.local import join_here

            identity = join_here(authority, name, role, into)
            out.say(f"{into}: {identity}, until {shown(identity.not_after)}")
            out.envelope(name=name, role=role, folder=into, serial=identity.serial)
            return
        token = str(authority.issue(name, role, _duration(expires)))
    out.error.print(
        f"lets one machine in as {role} {name}, within {expires}: hansa pki join HOST:PORT TOKENFILE",
        soft_wrap=True,
        markup=False,
    )
    if to is not None:
        try:
            replace(to, f"{token}\n".encode(), PRIVATE)
        except OSError as error:
            why = f"it cannot be written ({error.strerror})"
            raise InputError(
                "--output", str(to), why, "name a file in a folder that you may write"
            ) from error
        out.say(str(to))
    elif not json:
        print(token)
    out.envelope(name=name, role=role, token=None if to else token, path=to)


@pki.command(
    epilog=epilog(
        "Examples",
        "hansa pki join fl.example.org:8444 clinic-3.token",
        "hansa pki join fl.example.org:8444 - < clinic-3.token",
    )
)
def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT")],
    token: Annotated[str, typer.Argument(metavar="TOKENFILE")],
    folder: _Identity = _IDENTITY,
    json: Json = False,
) -> None:
    """Exchange a join token for a certificate; the private key is made here and stays here.

    HOST:PORT is the coordinator's enrolment port. TOKENFILE holds the token; - is standard input.
    """
    import asyncio

    from hansa.client.enrolment import join
    from hansa.core.trust import JoinToken

    given = JoinToken.parse(sys.stdin.read() if token == "-" else _text(token))
    _told(asyncio.run(join(given, address, folder)), folder, json)


@pki.command(
    epilog=epilog(
        "Examples", "hansa pki renew fl.example.org:8443", "hansa pki renew --host fl.example.org --pki pki"
    )
)
def renew(
    address: Annotated[str | None, typer.Argument(metavar="[HOST:PORT]", show_default=False)] = None,
    host: _Hosts = None,
    identity: _Identity = _IDENTITY,
    folder: _Pki = _PKI,
    json: Json = False,
) -> None:
    """Renew this machine's certificate at the coordinator HOST:PORT; or, there, the coordinator's own,
    under the names that it has or those of --host.

    Agents do so by themselves when half of the seven days are over, and so does the coordinator.
    """
    if address is None:
        with closing(_authority(folder)) as authority:
            authority.renew_coordinator(host or [])
        out = output(json)
        out.say(
            f"{folder}: the coordinator has a new certificate, which it shows from the next connection on"
        )
        out.envelope(folder=folder)
        return
    import asyncio

    import grpc

    from hansa.client.enrolment import renew
    from hansa.core.trust import channel_credentials

    async def renewed(address: str) -> Joined:
        async with grpc.aio.secure_channel(address, channel_credentials(identity)) as channel:
            return await renew(identity, channel, address)

    _told(asyncio.run(renewed(address)), identity, json)


@pki.command(epilog=epilog("Examples", 'hansa pki revoke clinic-3 --reason "laptop stolen"'))
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    reason: Annotated[str, typer.Option(help="For the audit log.")] = "",
    folder: _Pki = _PKI,
    json: Json = False,
) -> None:
    """Put NAME out: its certificates are refused from the next call on, and its unused tokens are void.

    NAME may be a serial: then that certificate alone.
    """
    out = output(json)
    with closing(_authority(folder)) as authority:
        revoked = authority.revoke(name, reason)
    count = f"{len(revoked)} certificate{'' if len(revoked) == 1 else 's'}"
    out.say(f"{name}: {count} revoked; unused tokens are void")
    out.envelope(name=name, serials=[each.serial for each in revoked])


@pki.command("ls")
def ls(folder: _Pki = _PKI, json: Json = False) -> None:
    """List certificates that have not expired, and tokens that nobody has used."""
    from hansa.core.trust.identity import shown

    out = output(json)
    with closing(_authority(folder)) as authority:
        members, tokens = authority.members(), authority.open_tokens()
    for each, reason in members:
        state = "certificate" if reason is None else "revoked"
        out.say(f"{each.role:<11}{each.name:<25}{state:<12}until {shown(each.not_after)}  {each.serial}")
    for token in tokens:
        out.say(f"{token.role:<11}{token.name:<25}{'token':<12}until {shown(token.expires)}")
    if not members and not tokens:
        out.say("nobody has joined yet; `hansa pki issue NAME` lets somebody in")
    out.envelope(
        certificates=[
            {
                "name": each.name,
                "role": each.role,
                "serial": each.serial,
                "not_after": each.not_after,
                "revoked": reason is not None,
            }
            for each, reason in members
        ],
        tokens=[{"name": each.name, "role": each.role, "expires": each.expires} for each in tokens],
    )


def _authority(folder: Path) -> Authority:
    from hansa.server.trust import Authority

    return Authority(folder)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise InputError(
            "token", path, why, "name the file that holds the join token, or - for standard input"
        ) from None


def _told(made: Joined, folder: Path, json: bool) -> None:
    from hansa.core.trust.identity import shown

    out = output(json)
    identity = made.identity
    out.say(f"{folder}: {identity}, until {shown(identity.not_after)}")
    if made.warning:
        out.error.print(made.warning, soft_wrap=True, markup=False)
    out.envelope(
        name=identity.name,
        role=identity.role,
        serial=identity.serial,
        not_after=identity.not_after,
        folder=folder,
        clock_skew_seconds=made.skew.total_seconds(),
    )


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if found is None:
        raise InputError("--expires", text, "it is no length of time", "write it as in 30m, 24h or 7d")
    return (
        int(found[1]) * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[found[2]]
    )
