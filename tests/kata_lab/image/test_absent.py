"""Empty libraries in place of those that programs are linked with and never need."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from kata_lab.image.absent import elf_hash, empty_library
from kata_lab.image.build import BuildOptions, build_image
from kata_lab.image.description import DescriptionError, find_description, load_description, parse_description

FUNCTIONS = {"open_it": "LIB_1.0", "close_it": "LIB_1.1", "plain": ""}


def dynamic(content: bytes) -> Any:
    """The dynamic section, found as a loader finds it: by its program header."""
    return next(each for each in ELFFile(io.BytesIO(content)).iter_segments() if each["p_type"] == "PT_DYNAMIC")


@pytest.mark.parametrize(("architecture", "machine"), [("riscv64", "EM_RISCV"), ("amd64", "EM_X86_64")])
def test_an_empty_library_has_the_name_and_the_functions(architecture: str, machine: str) -> None:
    content = empty_library("libit.so.1", FUNCTIONS, architecture)

    table = dynamic(content)
    assert ELFFile(io.BytesIO(content))["e_machine"] == machine
    assert [tag.soname for tag in table.iter_tags("DT_SONAME")] == ["libit.so.1"]
    assert {each.name for each in table.iter_symbols() if each.name} == set(FUNCTIONS)
    assert all(each["st_info"]["type"] == "STT_FUNC" for each in table.iter_symbols() if each.name)


def test_equal_functions_give_equal_bytes() -> None:
    shuffled = dict(reversed(FUNCTIONS.items()))

    assert empty_library("libit.so.1", FUNCTIONS, "riscv64") == empty_library("libit.so.1", shuffled, "riscv64")


def test_the_hash_is_that_of_the_abi() -> None:
    assert (elf_hash(""), elf_hash("printf"), elf_hash("GLIBC_2.2.5")) == (0, 0x077905A6, 0x09691A75)


@pytest.mark.parametrize(
    ("library", "problem"),
    [
        ("libffi.so.8", "'libffi.so.8' is in the image: exclude the package that brings it, too"),
        ("libffi.so.9", "no program needs a library 'libffi.so.9': did you mean 'libffi.so.8'?"),
    ],
)
def test_a_library_that_is_there_or_that_nothing_needs_is_refused(library: str, problem: str, tmp_path: Path) -> None:
    data = copy.deepcopy(load_description(find_description("lifsea")).data)
    data["name"] = "lifsea-absent"
    data["exclude"]["libraries"] = [library]

    with pytest.raises(DescriptionError, match=re.escape(f"$.exclude.libraries[0]: {problem}")):
        build_image(parse_description(data), BuildOptions(lock=tmp_path / "lock.json", progress="off"))


def test_what_is_no_name_of_a_library_is_refused() -> None:
    data = copy.deepcopy(load_description(find_description("lifsea")).data)
    data["exclude"]["libraries"] = ["../libffi.so.8"]

    with pytest.raises(DescriptionError, match=re.escape("$.exclude.libraries[0]")):
        parse_description(data)
