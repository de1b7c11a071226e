"""Virtio devices: the transport, the queues and one module per device."""
