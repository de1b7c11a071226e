"""Calls to the agent in the guest: Kata's agent API over ttrpc (``kata_lab/protocol/agent.proto``, ``health.proto``).

The last calls are kept with their times, for whoever wants to see them pass.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.protocol.proto import load
from kata_lab.ttrpc import Client, RpcError, StatusCode

AGENT: Final = "grpc.AgentService"
HEALTH: Final = "grpc.Health"
INTERFACE: Final = load("agent.proto", "health.proto")

RPC_PORT: Final = 1024
LOG_PORT: Final = 1025
DEBUG_CONSOLE_PORT: Final = 1026

DIAL_INTERVAL: Final = 0.01  #: seconds between two attempts to reach the agent
REMEMBERED_CALLS: Final = 1000

Dial = Callable[[], Awaitable[socket.socket]]


class AgentError(KataLabError):
    """The agent cannot be reached."""


@dataclass(frozen=True, slots=True)
class AgentCall:
    """A call that was made.

    Attributes:
        method: its name.
        request: the message.
        began: host seconds (``time.monotonic``).
        seconds: until it was answered.
        status: how it ended; OK for an answer.
    """

    method: str
    request: dict[str, Any]
    began: float
    seconds: float
    status: StatusCode


class AgentClient:
    """A connection to the agent. An asynchronous context manager.

    Args:
        client: connected to the agent's RPC port.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.calls: deque[AgentCall] = deque(maxlen=REMEMBERED_CALLS)
        #: Called with every call that has ended.
        self.on_call: Callable[[AgentCall], object] | None = None

    @classmethod
    async def connect(cls, dial: Dial, timeout: float, gone: Callable[[], str | None]) -> AgentClient:
        """Dial until the agent answers a health check.

        Args:
            dial: gives a connected socket, or raises while nobody listens.
            timeout: seconds after which to give up.
            gone: says why there will be no agent any more, or None while there may be one.

        Raises:
            AgentError: it did not answer in time, or never will.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                agent = cls(await Client.over(await dial(), INTERFACE))
                try:
                    await agent.check(max(deadline - time.monotonic(), DIAL_INTERVAL))
                    return agent
                except BaseException:
                    await agent.close()
                    raise
            except (OSError, KataLabError) as error:
                last = error
            except Exception as error:
                # The VMM's errors are not known here.
                if type(error).__module__.partition(".")[0] != "vmm":
                    raise
                last = error  # type: ignore[assignment]
            if (why := gone()) is not None:
                raise AgentError(f"the guest is gone before its agent answered: {why}") from last
            if time.monotonic() > deadline:
                raise AgentError(f"the agent did not answer within {timeout:g} s: {last}") from last
            await asyncio.sleep(DIAL_INTERVAL)

    async def call(self, method: str, timeout: float | None = None, /, **request: Any) -> dict[str, Any]:
        """Call a method of the AgentService with the fields of its request.

        Raises:
            RpcError: it failed.
        """
        return await self._call(AGENT, method, request, timeout)

    async def check(self, timeout: float | None = None) -> None:
        """Ask the agent whether it serves. RpcError if it does not answer, or says no."""
        answer = await self._call(HEALTH, "Check", {}, timeout)
        if answer["status"] != INTERFACE.enums["grpc.HealthCheckResponse.ServingStatus"]["SERVING"]:
            raise RpcError(StatusCode.UNAVAILABLE, f"the agent says that its status is {answer['status']}")

    async def version(self) -> str:
        """The agent's version."""
        return str((await self._call(HEALTH, "Version", {}, None))["agent_version"])

    async def _call(self, service: str, method: str, request: dict[str, Any], timeout: float | None) -> dict[str, Any]:
        began = time.monotonic()
        status = StatusCode.CANCELLED
        try:
            answer = await self._client.call(service, method, request, timeout)
            status = StatusCode.OK
            return answer
        except RpcError as error:
            status = error.code
            raise
        finally:
            ended = AgentCall(method, request, began, time.monotonic() - began, status)
            self.calls.append(ended)
            if self.on_call is not None:
                self.on_call(ended)

    @property
    def lost(self) -> RpcError | None:
        """Why the connection is of no more use; None while it is."""
        return self._client.lost

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def __aenter__(self) -> AgentClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
