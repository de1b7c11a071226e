"""The configuration: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmm import ConfigError, ConsoleConfig, VmConfig
from vmm.config import BalloonConfig


def test_defaults_are_one_hart_and_real_time() -> None:
    config = VmConfig()

    assert (config.vcpus, config.clock, config.kernel) == (1, "real", None)
    assert config.memory_bytes == config.memory_mib * 1024 * 1024


def test_paths_may_be_given_as_text() -> None:
    config = VmConfig(kernel="/boot/Image", initrd="initrd.cpio")

    assert (config.kernel, config.initrd) == (Path("/boot/Image"), Path("initrd.cpio"))


def test_plain_data_makes_the_same_configuration() -> None:
    data = {"vcpus": 2, "memory_mib": 128, "kernel": "Image", "console": {"report_lines": 5}}

    assert VmConfig.from_dict(data) == VmConfig(
        vcpus=2, memory_mib=128, kernel=Path("Image"), console=ConsoleConfig(report_lines=5)
    )


def test_a_mistyped_field_is_refused_with_the_likely_one() -> None:
    with pytest.raises(ConfigError, match="no field 'vcpu': did you mean 'vcpus'"):
        VmConfig.from_dict({"vcpu": 2})


def test_a_mistyped_console_field_is_refused_with_the_likely_one() -> None:
    with pytest.raises(ConfigError, match="console configuration has no field 'milestone': did you mean 'milestones'"):
        VmConfig.from_dict({"console": {"milestone": {}}})


def test_a_field_that_resembles_none_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"no field 'xyzzy': it knows vcpus, memory_mib"):
        VmConfig.from_dict({"xyzzy": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vcpus": 0}, "vcpus is 0, it must be from 1 to 32"),
        ({"vcpus": 33}, "vcpus is 33, it must be from 1 to 32"),
        ({"vcpus": "2"}, "vcpus is '2', it must be a whole number from 1 to 32"),
        ({"vcpus": True}, "vcpus is True, it must be a whole number"),
        ({"memory_mib": 0}, "memory_mib is 0, it must be from 1 to"),
        ({"memory_mib": -5}, "memory_mib is -5"),
        ({"memory_mib": "256M"}, "memory_mib is '256M', it must be a whole number"),
        ({"kernel": 7}, "kernel is 7, it must be the path of a file"),
        ({"initrd": ""}, "initrd is '', it must be the path of a file"),
        ({"cmdline": "a\0b"}, "without zero bytes"),
        ({"cmdline": "quiet\nkata.run=true"}, "must be one line"),
        ({"cmdline": "x" * 1024}, "cmdline has 1024 bytes, Linux keeps at most 1023"),
        ({"clock": "fast"}, "clock is 'fast', it must be 'real' or 'deterministic'"),
        ({"clock": "deterministic", "vcpus": 2}, "deterministic clock needs vcpus = 1, not 2"),
        ({"clock": "deterministic", "max_vcpus": 2}, "deterministic clock needs max_vcpus = 1, not 2"),
        ({"vcpus": 4, "max_vcpus": 3}, "max_vcpus is 3, it must be from 4 to 32"),
        ({"max_vcpus": 33}, "max_vcpus is 33, it must be from 1 to 32"),
        ({"max_vcpus": "4"}, "max_vcpus is '4', it must be a whole number from 1 to 32"),
        ({"max_memory_mib": 255}, "max_memory_mib is 255, it must be from 256 to"),
        ({"max_memory_mib": False}, "max_memory_mib is False, it must be a whole number"),
        ({"hotplug_slots": -1}, "hotplug_slots is -1, it must be from 0 to 32"),
        ({"hotplug_slots": 33}, "hotplug_slots is 33, it must be from 0 to 32"),
        ({"cmdline": "x" * 1014, "max_vcpus": 2}, "cmdline has 1024 bytes with 'maxcpus=1', Linux keeps at most 1023"),
        ({"console": 5}, "console is 5, it must be a ConsoleConfig"),
        ({"trace": "yes"}, "trace is 'yes', it must be True or False"),
        ({"console": {"report_lines": -1}}, "report_lines is -1"),
        ({"console": {"milestones": {"a": 1}}}, "must map names to regular expressions"),
    ],
)
def test_a_value_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VmConfig.from_dict(changes)


def test_a_changed_copy_is_checked_like_a_new_one() -> None:
    config = VmConfig(clock="deterministic")

    with pytest.raises(ConfigError, match="needs vcpus = 1"):
        config.replace(vcpus=2)
    assert config.replace(memory_mib=96).memory_mib == 96


def test_a_kernel_is_told_of_cpus_that_it_shall_leave_alone() -> None:
    config = VmConfig(vcpus=2, max_vcpus=8, cmdline="quiet -- init's own")

    assert config.boot_cmdline == "maxcpus=2 quiet -- init's own"
    assert (config.harts, config.cmdline) == (8, "quiet -- init's own")
    assert config.replace(max_vcpus=None).boot_cmdline == config.cmdline


def test_memory_for_later_is_held_by_a_balloon() -> None:
    config = VmConfig(memory_mib=128, max_memory_mib=512)

    assert (config.memory_bytes, config.spare_memory_mib) == (512 << 20, 384)
    assert config.devices == (BalloonConfig(name="balloon0", deflate_on_oom=False),)
    assert config.replace(memory_mib=256).devices == config.devices


def test_a_balloon_that_is_there_is_the_one_that_holds_memory() -> None:
    own = BalloonConfig(name="mine")

    assert VmConfig(memory_mib=128, max_memory_mib=512, devices=(own,)).devices == (own,)
    assert VmConfig(memory_mib=128, max_memory_mib=128).devices == ()
