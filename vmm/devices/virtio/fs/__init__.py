"""The file system device: host directories in the guest, served by FUSE inside the VMM.

From the wire inwards: ``protocol`` declares what travels, ``device`` takes requests from the queues and gives answers
back, ``server`` begins and ends sessions and finds the operation, ``names``, ``attributes``, ``files`` and
``directories`` are the operations, ``share`` is what they work with, ``inodes`` and ``opened`` are its tables, and
``host`` reaches the host's kernel.
"""
