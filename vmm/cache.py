"""Where compiled code is kept between runs.

``$KATA_LAB_HOME/cache`` if that is set, else ``$XDG_CACHE_HOME/kata-lab``, else ``~/.cache/kata-lab``.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The directory for what can be made again; it may not exist yet."""
    home = os.environ.get("KATA_LAB_HOME")
    if home:
        return Path(home) / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kata-lab"
