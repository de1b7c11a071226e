"""``kata-lab bench image``: how much smaller the lifsea image is than the debian image, and how much sooner it is up.

Both are built from their descriptions, or taken as they are if they are built, and booted as a person boots them, with
``kata-lab boot`` as a process of its own, in turns, with the same number of harts and the same memory. The clock runs
from exec until the line has been read that a guest prints once its services are started: lifsea's own init prints it
itself, in debian a unit of systemd does that is ordered after ``basic.target`` and after the services which debian has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kata_lab.bench.boot import prepare, versions
from kata_lab.bench.measure import Sample, Watched, alternate, steps, warm
from kata_lab.image.build import SERVICES_MARKER, build_named

if TYPE_CHECKING:
    from kata_lab.image.library import Image

MEMORY_MIB = 1024  #: debian's root is unpacked into RAM, from an archive that lies in RAM


@dataclass(frozen=True, slots=True, kw_only=True)
class OneImage:
    """One image.

    Attributes:
        packages: Debian packages in its root; the kernel's is not among them.
        bytes: of the file with the root, uncompressed.
        boot_s: exec to services up, seconds, median.
        boot_spread: largest less smallest run, as a fraction of the median.
        pss_bytes: memory of the process when the services are up, median.
        kernel: release of its kernel.
    """

    packages: int
    bytes: int
    boot_s: float
    boot_spread: float
    pss_bytes: int
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFigures:
    """What was measured.

    Attributes:
        lifsea, debian: the two images.
        fewer_packages: by what fraction of debian's packages lifsea has fewer.
        fewer_bytes: by what fraction of debian's root lifsea's is smaller.
        times_sooner: debian's boot_s / lifsea's boot_s.
        runs: measured boots of each image.
        memory_mib: RAM of the guest, of either.
        versions: of what took part.
    """

    lifsea: OneImage
    debian: OneImage
    fewer_packages: float
    fewer_bytes: float
    times_sooner: float
    runs: int
    memory_mib: int = MEMORY_MIB
    versions: dict[str, str] = field(default_factory=dict)


def measure_images(runs: int) -> ImageFigures:
    """Measure.

    Raises:
        BenchError: a guest did not get to its services.
        ImageError: an image cannot be built.
    """
    images = [build_named(name) for name in ("lifsea", "debian")]
    prepare()
    warm([file for image in images for file in (image.kernel, image.root)])
    pss: dict[str, list[float]] = {image.name: [] for image in images}
    with steps("Measuring boots", len(images) * (runs + 1)) as begin:
        lifsea_s, debian_s = alternate(runs, *(_side(image, pss[image.name], begin) for image in images))
    lifsea, debian = (
        OneImage(
            packages=len(image.manifest["packages"]),
            bytes=image.bytes,
            boot_s=seconds.median,
            boot_spread=seconds.spread,
            pss_bytes=int(Sample(tuple(pss[image.name][1:])).median),
            kernel=image.manifest["release"],
        )
        for image, seconds in zip(images, (lifsea_s, debian_s), strict=True)
    )
    return ImageFigures(
        lifsea=lifsea,
        debian=debian,
        fewer_packages=1 - lifsea.packages / debian.packages,
        fewer_bytes=1 - lifsea.bytes / debian.bytes,
        times_sooner=debian.boot_s / lifsea.boot_s,
        runs=runs,
        versions=versions(),
    )


def _side(image: Image, pss: list[float], begin: Callable[[str], None]) -> Callable[[], float]:
    files = ("--kernel", str(image.kernel), "--initrd", str(image.root))
    command = [sys.executable, "-m", "kata_lab", "boot", *files, "--cmdline", image.append, "--memory", str(MEMORY_MIB)]

    def boot() -> float:
        begin(image.name)
        with Watched(command) as process:
            seconds = process.seconds_until(SERVICES_MARKER)
            pss.append(process.pss_bytes)
        return seconds

    return boot
