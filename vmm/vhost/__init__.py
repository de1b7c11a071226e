"""A file system device whose requests are served by a process of its own, over shared memory (vhost-user).

``python -m vmm.vhost.fs SOCKET`` is the back end: our own file system device, as it is inside the VMM in the other
arrangement, working on guest memory that it got from the VMM (``backend``, ``memory``). ``frontend`` is the device in
the VMM that the guest sees, and ``ring`` are the queues through which the two work. ``messages`` and ``channel`` are
what travels between them, ``process`` starts a back end.

::

    guest ──buffers──► VMM: frontend ──ring, eventfd──► vmm.vhost.fs ──► the host's files
      ▲                   │                                │
      └──── used, irq ◄───┴──── eventfd ◄── used ──────────┘   data: straight between the host's files and guest memory
"""
