"""The socket device (virtio 1.2, section 5.10): stream sockets between host and guest.

``packet`` is the wire format, ``connection`` one stream and its credit, ``endpoint`` the host's unix sockets, and
``device`` the device, which joins them.
"""
