"""A device tree to open and close, node by node.

Values are shown as device tree source (Devicetree Specification v0.4, chapter 6), as :class:`vmm.board.fdt.Node`
prints them; long ones are cut.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kata_lab.lab.picture import Picture

if TYPE_CHECKING:
    from vmm.board.fdt import Node

_LONGEST_VALUE = 90


def draw_tree(root: Node, open_depth: int = 1) -> Picture:
    """The tree as nested lists, open down to ``open_depth``; in words, its source."""
    return Picture(f"<div style='font-family:monospace'>{_node(root, 0, open_depth)}</div>", str(root).rstrip())


def _node(shown: Node, depth: int, open_depth: int) -> str:
    inside = "".join(
        f"<div style='margin-left:2em'>{html.escape(line)}</div>" for line in _properties(shown)
    ) + "".join(_node(child, depth + 1, open_depth) for child in shown.children)
    opened = " open" if depth < open_depth else ""
    count = f" <small>({len(shown.children)} inside)</small>" if shown.children else ""
    summary = f"<summary><b>{html.escape(shown.name or '/')}</b>{count}</summary>"
    return f"<details{opened} style='margin-left:{1.5 if depth else 0}em'>{summary}{inside}</details>"


def _properties(shown: Node) -> Iterator[str]:
    # The node's own printer knows how values look; the lines between its braces are the properties.
    for line in str(type(shown)(shown.name, shown.properties)).splitlines():
        text = line.strip()
        if text and not text.endswith("{") and text not in ("/dts-v1/;", "};"):
            yield text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
