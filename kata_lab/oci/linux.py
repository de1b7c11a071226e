"""Names that Linux gives to what a container may be given: capabilities, limits, namespaces, and a few more.

From capabilities(7) and getrlimit(2) of Linux 6.12, and from the OCI runtime specification 1.1 (config-linux.md).
"""

from __future__ import annotations

from typing import Final


def _named(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in names.split())


CAPABILITIES: Final = _named(
    "CAP_",
    (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL "
        "SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    ),
)
"""In the order of their numbers."""

DEFAULT_CAPABILITIES: Final = _named(
    "CAP_",
    (
        "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT "
        "KILL AUDIT_WRITE"
    ),
)
"""What container engines leave to root in a container."""

RLIMITS: Final = _named(
    "RLIMIT_", ("AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK")
)

NAMESPACES: Final = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")

PROPAGATIONS: Final = (
    *("private", "shared", "slave", "unbindable"),
    *("rprivate", "rshared", "rslave", "runbindable"),
)

SECCOMP_ACTIONS: Final = _named("SCMP_ACT_", "KILL KILL_PROCESS KILL_THREAD TRAP ERRNO TRACE ALLOW LOG NOTIFY")

SECCOMP_ARCHITECTURES: Final = _named(
    "SCMP_ARCH_",
    (
        "X86 X86_64 X32 ARM AARCH64 MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64 PPC64LE S390 S390X "
        "PARISC PARISC64 RISCV64 LOONGARCH64 M68K SH SHEB"
    ),
)

SECCOMP_FLAGS: Final = _named("SECCOMP_FILTER_FLAG_", "TSYNC LOG SPEC_ALLOW WAIT_KILLABLE_RECV")

SECCOMP_OPERATORS: Final = _named("SCMP_CMP_", "NE LT LE EQ GE GT MASKED_EQ")

IPC_SYSCTLS: Final = frozenset(
    _named(
        "kernel.", "msgmax msgmnb msgmni msg_next_id sem sem_next_id shmall shmmax shmmni shm_next_id shm_rmid_forced"
    )
)
"""System parameters that belong to an IPC namespace; with them go all beneath fs.mqueue."""

UTS_SYSCTLS: Final = frozenset(("kernel.hostname", "kernel.domainname"))

MASKED_PATHS: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
"""What tells too much of the kernel, and nothing that a container needs."""

READONLY_PATHS: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""Through what a container could change its kernel."""
