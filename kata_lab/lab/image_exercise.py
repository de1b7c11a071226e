"""Checks of the exercises of notebook 2, "Build a guest".

What is checked is the image that was built, not how it was described: it is booted, and its service is looked at.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from kata_lab.image.boot import EXIT_STATUS, append_running
from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved
from vmm.actions import EndKind
from vmm.config import VmConfig
from vmm.microvm import MicroVm

if TYPE_CHECKING:
    from kata_lab.image.library import Image

SERVICE: Final = "beacon"
PACKAGE: Final = "crun"
_REASONS: Final = {"a": False, "b": True, "c": False}
_SECONDS: Final = 120.0
# Does it write, does it go on, is the writer alive, and does another one go on when it is killed?
_WATCH: Final = (
    "f=/run/beacon; sleep 1; [ -s $f ] || exit 3; "
    "n=$(wc -l <$f); sleep 1; [ $(wc -l <$f) -gt $n ] || exit 4; "
    "p=$(tail -n 1 $f); kill -0 $p || exit 5; kill -9 $p; sleep 2; "
    "[ $(tail -n 1 $f) != $p ] || exit 6; exit 0"
)
_PROBLEMS: Final = {
    3: "one second after the services were up, /run/beacon is not there or empty: read the console of the guest, or "
    "try the command in its shell.",
    4: "/run/beacon does not grow: the service has to go on writing, at least once a second.",
    5: "the last line of /run/beacon is not the number of a process that is alive: write the shell's own number, $$.",
    6: "the process was killed and no other one went on writing: say in the description when it is restarted.",
}


@checks("02-own-guest")
def check_edit(image: Image, original: Image) -> Feedback:
    """Whether an image has the service that was asked for and lacks the package; it is booted.

    Args:
        image: the learner's.
        original: what it was made from.
    """
    packages, before = _packages(image), _packages(original)
    services = list(image.manifest["services"])
    if packages == before and services == list(original.manifest["services"]):
        return not_yet("the image is still the one that you began with: change the two places, then run both cells.")
    if PACKAGE in packages:
        return not_right(f"the package {PACKAGE!r} is still in the image: who asks for it?")
    if SERVICE not in services:
        return not_right(f"the image has the services {', '.join(services)}, and none is called {SERVICE!r}.")
    lost = [name for name in original.manifest["services"] if name not in services]
    if lost:
        return not_right(f"the service {lost[0]!r} is gone: add one to the list, and leave the others in it.")
    if "log" not in _described(image, SERVICE).get("after", ()):
        return not_right(f"the service {SERVICE!r} is to be started after 'log'; the description does not say so.")
    config = VmConfig(
        kernel=image.kernel, initrd=image.root, cmdline=append_running(_WATCH, image.append), memory_mib=192
    )
    with MicroVm(config) as vm:
        vm.start()
        end, console = vm.wait(_SECONDS), vm.console.text
    told = EXIT_STATUS.findall(console)
    if end.kind is not EndKind.SHUTDOWN or not told:
        last = console.replace("\r", "").strip().splitlines()[-1:] or ["nothing"]
        return not_right(f"the guest did not come up and shut down; its last words are {last[0]!r}.")
    status = int(told[-1])
    if status:
        return not_right(_PROBLEMS.get(status, f"looking at the service ended with status {status}."))
    return solved("the guest is smaller, the beacon is up, and it comes back when it is killed.")


@checks("02-explain")
def check_explanation(gone: Collection[str] | None, reason: str | None, image: Image, original: Image) -> Feedback:
    """Whether the packages that left with the removed one are named, and why another one stayed."""
    if not gone or reason is None:
        return not_yet("fill in `gone` and `reason` in the cell above, run that cell, then this one again.")
    left = _packages(original) - _packages(image)
    if PACKAGE not in left:
        return not_yet(f"solve the first part first: {PACKAGE!r} is still in the image.")
    named = set(gone) - {PACKAGE}
    wrong = sorted(named - left)
    if wrong:
        return not_right(f"{wrong[0]!r} did not leave the image: compare the two images once more.")
    missing = len(left - {PACKAGE} - named)
    if missing:
        return not_right(f"{missing} more left together with {PACKAGE!r}: the table of differences has them.")
    if reason not in _REASONS:
        return not_right(f"`reason` is {reason!r}: it is one of 'a', 'b' and 'c'.")
    if not _REASONS[reason]:
        return not_right("the packages are right, the reason is not: which packages does an image get at all?")
    return solved("a root is what was asked for and what that needs, and nothing else.")


def _packages(image: Image) -> set[str]:
    return {each["name"] for each in image.manifest["packages"]}


def _described(image: Image, service: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = next(
        each for each in image.manifest["description"]["services"] if each["name"] == service
    )
    return found
