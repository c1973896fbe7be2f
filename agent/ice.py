"""Which addresses and UDP ports the video uses: aiortc has no setting for either.

aioice binds one socket per address of the machine, loopback left out, each on a port the kernel chooses, and
aiortc makes aioice's connections itself. So the connection class that aiortc uses is replaced by one that binds
where the settings say; nothing else of it changes. Packets then also flow on a machine without any network, and
a preview that is bound to loopback opens no port on another address.
"""

import asyncio
import ipaddress
import random
from collections.abc import Sequence
from functools import partial

import aiortc.rtcicetransport
from aioice import Candidate, Connection
from aioice.candidate import candidate_foundation, candidate_priority
from aioice.ice import StunProtocol

from flawline.config.settings_preview import PreviewSettings


class BoundConnection(Connection):
    """An ICE connection with host candidates on the given addresses and ports only."""

    def __init__(
        self, *arguments: object, hosts: Sequence[str] = (), ports: tuple[int, int] | None = None, **named: object
    ) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self._hosts = hosts
        self._ports = ports

    async def get_component_candidates(
        self,
        component: int,
        addresses: list[str],
        timeout: int = 5,  # noqa: ASYNC109
    ) -> list[Candidate]:
        """One candidate for each address that can be bound. No server is asked for more."""
        candidates = []
        for host in self._hosts or [*addresses, "127.0.0.1"]:
            protocol = await self._bind(host)
            if protocol is None:
                continue
            host, port = protocol.transport.get_extra_info("sockname")[:2]
            protocol.local_candidate = Candidate(
                foundation=candidate_foundation("host", "udp", host),
                component=component,
                transport="udp",
                priority=candidate_priority(component, "host"),
                host=host,
                port=port,
                type="host",
            )
            self._protocols.append(protocol)
            candidates.append(protocol.local_candidate)
        return candidates

    async def _bind(self, host: str) -> StunProtocol | None:
        """A socket on a free port of the range, or None where there is none."""
        ports = [0]
        if self._ports is not None:
            ports = list(range(self._ports[0], self._ports[1] + 1))
            random.shuffle(ports)
        for port in ports:
            try:
                _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
                    lambda: StunProtocol(self), local_addr=(host, port)
                )
            except OSError:
                continue
            return protocol
        return None


def use_settings(settings: PreviewSettings) -> None:
    """From now on aiortc's connections in this process bind as the settings say."""
    hosts = list(settings.addresses)
    if not hosts and not _is_any(settings.host):
        hosts = ["127.0.0.1" if settings.host == "localhost" else settings.host]
    aiortc.rtcicetransport.Connection = partial(BoundConnection, hosts=hosts, ports=settings.udp_ports)


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
