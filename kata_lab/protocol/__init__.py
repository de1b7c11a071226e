"""The wire protocols of a sandbox: their interface files (``*.proto``) and how messages become bytes.

The interface files are read once per process (:mod:`kata_lab.protocol.proto`); messages are plain dictionaries, encoded
and decoded by :mod:`kata_lab.protocol.wire`, which the guest uses as well.
"""
