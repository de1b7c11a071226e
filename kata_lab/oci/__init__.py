"""Containers as the Open Container Initiative writes them down: configurations, images, layers; and a local store.

::

    open_image("busybox") ─▶ ImageHandle ─▶ layers()            directories for an overlay, lowest first
                                │      └──▶ unpack_rootfs()     one plain directory
                                ▼
    load_spec(bundle)        make_spec(image, args, env, …)
          └───────▶ config.json, plain and checked ◀──┘
                                │
                                ▼
                          agent_spec()                          the message that the agent takes

Follows the OCI runtime specification 1.1 and the OCI image specification 1.1; each module says what it leaves out.
"""

from kata_lab.oci.agent_message import agent_process, agent_resources, agent_spec
from kata_lab.oci.busybox import build_busybox, ensure_busybox
from kata_lab.oci.container import Wishes, make_spec, parse_size
from kata_lab.oci.descriptor import ImageConfig, OciError
from kata_lab.oci.image import ImageHandle, open_image
from kata_lab.oci.library import Pruned, StoredImage, import_image, list_images, prune, remove_image
from kata_lab.oci.rootfs import unpack_rootfs
from kata_lab.oci.spec import SpecError, check_process, check_resources, check_spec, load_spec
from kata_lab.oci.unpack import Limits

__all__ = [
    "ImageConfig",
    "ImageHandle",
    "Limits",
    "OciError",
    "Pruned",
    "SpecError",
    "StoredImage",
    "Wishes",
    "agent_process",
    "agent_resources",
    "agent_spec",
    "build_busybox",
    "check_process",
    "check_resources",
    "check_spec",
    "ensure_busybox",
    "import_image",
    "list_images",
    "load_spec",
    "make_spec",
    "open_image",
    "parse_size",
    "prune",
    "remove_image",
    "unpack_rootfs",
]
