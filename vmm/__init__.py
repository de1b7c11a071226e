"""The virtual machine monitor: a library that knows nothing of containers."""
