"""A VMM in a process of its own: the actions of :mod:`vmm.actions` over a unix socket.

::

    from vmm.rpc.client import RemoteVm

    with RemoteVm(VmConfig(kernel="Image", initrd="initrd.cpio")) as vm:
        vm.start()
        vm.console.expect("login")

``client`` is the VM as its user sees it, the same as :class:`vmm.MicroVm`; it starts ``python -m vmm.rpc SOCKET``,
which is ``server``. Between them: ``wire`` (frames and messages), ``codec`` (values as JSON), ``endpoint`` (a unix
socket for one user) and ``process`` (a process that does not outlive the one that started it); ``vsock`` reaches the
guest's sockets from outside of the VMM.
"""
