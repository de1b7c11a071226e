"""How a call fails: gRPC's status codes (gRPC documentation, "Status codes and their use")."""

from __future__ import annotations

import enum

from kata_lab.errors import KataLabError


class StatusCode(enum.IntEnum):
    """What a call's status says."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class RpcError(KataLabError):
    """A call that failed.

    Attributes:
        code: why; a number that gRPC does not define counts as UNKNOWN.
        message: a sentence.
    """

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message or code.name.lower().replace("_", " "))
        self.code = code
        self.message = message
