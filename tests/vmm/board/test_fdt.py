"""The device tree writer and reader; dtc is the referee."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.board.fdt import Node, cells64, node, read_fdt, write_fdt
from vmm.board.riscv_virt import Chosen, build_tree
from vmm.errors import BootError, ConfigError

needs_dtc = pytest.mark.usefixtures("dtc_is_installed")

NAMES = st.from_regex(r"[a-z][0-9A-Za-z,._+-]{0,12}(@[0-9a-f]{1,8})?", fullmatch=True)
PROPERTIES = st.dictionaries(
    st.from_regex(r"[a-z#][0-9A-Za-z,._+?#-]{0,20}", fullmatch=True),
    st.one_of(
        st.just(True),
        st.integers(0, 0xFFFF_FFFF),
        st.lists(st.integers(0, 0xFFFF_FFFF)),
        st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)),
        st.lists(st.text(st.characters(min_codepoint=1, codec="utf-8")), max_size=4),
        st.binary(max_size=70),
    ),
    max_size=5,
)


def nodes(name: st.SearchStrategy[str]) -> st.SearchStrategy[Node]:
    return st.recursive(
        st.builds(node, NAMES, PROPERTIES),
        lambda inner: st.builds(
            lambda name, properties, children: node(name, properties, *children),
            NAMES,
            PROPERTIES,
            st.lists(inner, max_size=3, unique_by=lambda child: child.name),
        ),
        max_leaves=8,
    ).flatmap(lambda tree: name.map(lambda root: Node(root, tree.properties, tree.children)))


def dtc(blob: bytes, *arguments: str) -> bytes:
    done = subprocess.run(["dtc", "-q", *arguments], input=blob, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@given(nodes(st.just("")))
def test_tree_is_read_back_as_written(tree: Node) -> None:
    assert read_fdt(write_fdt(tree, [(0x8000_0000, 0x1000)], boot_cpu=3)) == tree


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(BootError):
        read_fdt(blob)


@given(st.data())
def test_damaged_blob_is_read_or_refused(data: st.DataObject) -> None:
    blob = bytearray(write_fdt(build_tree(1, 1 << 27, Chosen(seed=1), slots=1)))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))

    with suppress(BootError):
        read_fdt(bytes(blob[: data.draw(st.integers(0, len(blob)))]))


def test_values_are_encoded_as_the_specification_says() -> None:
    tree = node("", {"a": 1, "b": [1, 2], "c": "x", "d": ["x", "yz"], "e": True, "f": False, "g": b"\x01"})

    assert tree.properties == {
        "a": b"\0\0\0\1",
        "b": b"\0\0\0\1\0\0\0\2",
        "c": b"x\0",
        "d": b"x\0yz\0",
        "e": b"",
        "g": b"\1",
    }
    assert cells64(0x1_2345_6789, 2) == (1, 0x2345_6789, 0, 2)


def test_property_names_are_stored_once() -> None:
    tree = node("", {"compatible": "a"}, node("x", {"compatible": "b"}), node("y", {"compatible": "c"}))

    assert write_fdt(tree).count(b"compatible\0") == 1


def test_nodes_are_found_by_path() -> None:
    tree = build_tree(2, 1 << 27, Chosen(), slots=2)

    assert tree.find("/soc/serial@10000000").strings("compatible") == ("ns16550a",)
    assert tree.find("/cpus/cpu@1").cells("reg") == (1,)
    assert tree.find("/") is tree
    with pytest.raises(ConfigError, match=r"/soc/rtc ends at 'rtc'; there is interrupt-controller@c000000"):
        tree.find("/soc/rtc")
    with pytest.raises(ConfigError, match="has no property colour"):
        tree.find("/cpus").cells("colour")
    with pytest.raises(ConfigError, match="are not whole cells"):
        tree.find("/soc/serial@10000000").cells("compatible")


@pytest.mark.parametrize("name", ["a b", "a" * 32, "@1", "a@", "a/b", "ä"])
def test_node_name_that_the_specification_forbids_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="node name"):
        node(name)


@pytest.mark.parametrize("name", ["", "a b", "a" * 32, "a@1", "ä"])
def test_property_name_that_the_specification_forbids_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="property name"):
        node("", {name: 1})


def test_cell_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match="property reg has the cell 0x100000000, which must fit 32 bits"):
        node("", {"reg": [1, 1 << 32]})
    with pytest.raises(ConfigError, match="cell -0x1"):
        node("", {"reg": -1})


def test_text_with_a_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold no NUL"):
        node("", {"model": "a\0b"})


def test_children_need_different_names() -> None:
    with pytest.raises(ConfigError, match="names of their own"):
        node("", {}, node("a"), node("a"))


def test_root_with_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty name, not 'root'"):
        write_fdt(node("root"))


@pytest.fixture(scope="session")
def dtc_is_installed(program: Callable[[str], str]) -> None:
    program("dtc")


@needs_dtc
@pytest.mark.parametrize("harts", [1, 4])
def test_dtc_reads_the_board_as_we_do(harts: int) -> None:
    tree = build_tree(harts, 1 << 28, Chosen('console=ttyS0 root="a\\b"', (0x8300_0000, 0x8340_0000), seed=7))
    blob = write_fdt(tree, [(0x8000_0000, 0x2000)])

    source = dtc(blob, "-I", "dtb", "-O", "dts")

    assert read_fdt(dtc(source, "-I", "dts", "-O", "dtb")) == tree
    assert b"/memreserve/\t0x0000000080000000 0x0000000000002000;" in source


@needs_dtc
def test_dtc_reads_our_source_as_we_meant_it() -> None:
    tree = build_tree(2, 1 << 28, Chosen('quiet "quoted" \\ back', seed=7))

    assert read_fdt(dtc(str(tree).encode(), "-I", "dts", "-O", "dtb")) == tree


@needs_dtc
def test_dtc_has_nothing_to_warn_about(tmp_path: Path) -> None:
    blob = tmp_path / "board.dtb"
    blob.write_bytes(write_fdt(build_tree(2, 1 << 28, Chosen("quiet", (0x8300_0000, 0x8340_0000)))))

    done = subprocess.run(["dtc", "-I", "dtb", "-O", "dts", blob], capture_output=True, text=True, check=True)

    assert done.stderr == ""
