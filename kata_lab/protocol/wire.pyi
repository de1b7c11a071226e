from typing import Any

MAX_DEPTH: int

class WireError(ValueError): ...

def encode(schema: dict[str, dict[int, tuple[str, str, str]]], name: str, message: dict[str, Any]) -> bytes: ...
def decode(
    schema: dict[str, dict[int, tuple[str, str, str]]], name: str, data: bytes | memoryview, depth: int = 0
) -> dict[str, Any]: ...
