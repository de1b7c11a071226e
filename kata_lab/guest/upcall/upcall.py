"""Upcall, the guest's side: one client at a time, which asks for CPUs and devices (host's side: vmm/upcall.py).

Who connects says ``d`` and is told CONNECT; then every request of 1024 bytes is answered with 1024 bytes, little
endian::

    request   u32 magic | u32 msg_size | u32 msg_type | u32 msg_flags | body
    reply     u32 magic | u32 msg_size | u32 msg_type | u32 msg_flags | i32 result, 0 or a negative errno | body

Requests are carried out one after the other, whoever sent them: a client that
comes takes the place of the one before, and is told CONNECT when nothing is under way any more. What is no frame ends
the connection; nothing ends the service. Left out: memory and PCI (EOPNOTSUPP).

What carries a request out is loaded when it is first asked for, which makes the guest's start shorter. While one is
carried out, the kernel forces RCU's grace periods instead of waiting for them (``/sys/kernel/rcu_expedited``,
kernel/ksysfs.c): a CPU comes up in a third of the time.
"""

import errno
import select
import socket
import struct
import sys

PORT = 219
SERVICE = 0x64  # "d"
FRAME = 1024
MAGIC = 0x444D0100
CONNECT, ADD_CPU, DEL_CPU, ADD_MEM, DEL_MEM, ADD_MMIO, DEL_MMIO = range(7)
EAFNOSUPPORT = 97

_AF_VSOCK, _ANY, _MSG_NOSIGNAL = 40, 0xFFFFFFFF, 0x4000
_HEADER, _RESULT, _BODY = 16, 16, 20
_EXPEDITED = "/sys/kernel/rcu_expedited"
_CPUS, _APIC_CPUS, _MMIO = 1, 258, 24


def _change_cpus(kind, body):
    import processors

    return (processors.add if kind == ADD_CPU else processors.remove)(body[0])


def _change_mmio(kind, body):
    import slots

    base, size, irq = struct.unpack_from("<QQI", body)
    (slots.add if kind == ADD_MMIO else slots.remove)(base, size, irq)


_REQUESTS = {  # type: what carries it out, and the sizes that its body may have
    ADD_CPU: (_change_cpus, (_CPUS, _APIC_CPUS)),
    DEL_CPU: (_change_cpus, (_CPUS, _APIC_CPUS)),
    ADD_MMIO: (_change_mmio, (_MMIO,)),
    DEL_MMIO: (_change_mmio, (_MMIO,)),
}


def _hurry(how):
    """How the kernel waits for grace periods from now on; how it did before. Nothing where it cannot be told."""
    try:
        with open(_EXPEDITED) as file:
            before = file.read()
        with open(_EXPEDITED, "w") as file:
            file.write(how)
        return before
    except OSError:
        return how


def _carry_out(frame):
    """The result of a request, and the word of its reply's body if there is one."""
    _, size, kind, _ = struct.unpack_from("<IIII", frame)
    if kind not in _REQUESTS:
        return -errno.EOPNOTSUPP, None
    work, sizes = _REQUESTS[kind]
    if size not in sizes:
        return -errno.EINVAL, None
    try:
        before = _hurry("1")
        try:
            return 0, work(kind, memoryview(frame)[_HEADER : _HEADER + size])
        finally:
            _hurry(before)
    except OSError as error:
        return -(error.args[0] or errno.EIO), None
    except MemoryError:
        return -errno.ENOMEM, None
    except Exception as error:
        sys.print_exception(error)
        return -errno.EIO, None


class Client:
    """Who has connected, and the frame that is coming."""

    def __init__(self, connection):
        self.connection = connection
        self._frame = bytearray(FRAME)
        self._length = 0
        self._greeted = False

    def serve(self):
        """Take what has come and answer; False where the connection is of no more use."""
        try:
            return self._take()
        except OSError:
            return False

    def _take(self):
        wanted = FRAME if self._greeted else 1
        count = self.connection.readinto(memoryview(self._frame)[self._length : wanted])
        if count is None:
            return True
        self._length += count
        if self._length < wanted:
            return count > 0
        self._length = 0
        if self._greeted:
            return self._answer()
        self._greeted = True
        return self._frame[0] == SERVICE and self._reply(CONNECT, 0, None)

    def _answer(self):
        magic, _, kind, _ = struct.unpack_from("<IIII", self._frame)
        return magic == MAGIC and self._reply(kind, *_carry_out(self._frame))

    def _reply(self, kind, result, word):
        """Send a reply; False if the client does not read."""
        reply = bytearray(FRAME)
        struct.pack_into("<IIIIi", reply, 0, MAGIC, 0 if word is None else 4, kind, 0, result)
        if word is not None:
            struct.pack_into("<I", reply, _BODY, word)
        return self.connection.send(reply, _MSG_NOSIGNAL) == FRAME


def _listen():
    listener = socket.socket(_AF_VSOCK, socket.SOCK_STREAM)
    listener.bind(struct.pack("<HHIIBBBB", _AF_VSOCK, 0, PORT, _ANY, 0, 0, 0, 0))
    listener.listen(4)
    listener.setblocking(False)
    return listener


def serve():
    """Serve for ever; at once over in a guest that has no vsock, where nobody can ask."""
    try:
        listener = _listen()
    except OSError as error:
        if error.args[0] == EAFNOSUPPORT:
            return
        raise
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    client = None
    while True:
        for ready, _ in poll.poll():
            if ready is listener:
                if client is not None:
                    client = _end(poll, client)
                client = _accept(poll, listener)
            elif client is not None and ready is client.connection and not client.serve():
                client = _end(poll, client)


def _accept(poll, listener):
    try:
        connection, _ = listener.accept()
    except OSError:
        return None  # gone already
    connection.setblocking(False)
    poll.register(connection, select.POLLIN)
    return Client(connection)


def _end(poll, client):
    poll.unregister(client.connection)
    client.connection.close()
