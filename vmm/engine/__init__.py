"""What executes guest code. Each engine looks like KVM: ``run()`` returns an :class:`~vmm.engine.base.Exit`."""
