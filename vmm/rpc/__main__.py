"""``python -m vmm.rpc SOCKET``: the VMM process. It ends with whoever uses it; see :mod:`vmm.rpc.server`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from vmm.errors import VmmError
from vmm.rpc.server import serve


def main() -> int:
    """Serve; the exit status is 0, or 1 after one sentence on standard error."""
    parser = argparse.ArgumentParser("python -m vmm.rpc", description="Serve one virtual machine over a unix socket.")
    parser.add_argument("socket", type=Path, help="path of the socket, in a directory that only this user can enter")
    try:
        asyncio.run(serve(parser.parse_args().socket))
    except VmmError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
