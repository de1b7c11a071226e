"""One process per sandbox: it holds the VMM and the runtime, and serves the sandbox's containers on a unix socket.

==================  ===================================================================================
module              what it is
==================  ===================================================================================
``__main__``        the process: arguments, readiness, signals, the end
``shim``            sandbox and containers as the services see them: create, start, exec, stop, restart
``task_service``    containerd's Task API
``lab_service``     what that API has not: attached streams, logs, time line, metrics
``task``, ``hub``   one container and its processes; who sees what a process writes
``output_log``      the files that keep what containers wrote
``stdio``           the named pipes and files of the Task API
``records``         containers and shims on disk, which every command reads
``launch``          how a command starts a shim
``client``          how a command talks to one
==================  ===================================================================================

Files, beneath the state directory (:func:`kata_lab.paths.state_directory`)::

    containers/ID/container.json   what a container is and where it is in its life
    containers/ID/output.log       what it wrote, see output_log
    shims/SANDBOX/shim.json        which process it is
    shims/SANDBOX/shim.sock        where it listens
    shims/SANDBOX/shim.log         what it had to say
    sandboxes/SANDBOX/             the runtime's own (kata_lab.runtime.state)

A shim that was killed takes its guest with it, since they are one process; the files stay, and the next command sees
by the process's number and start time that nobody lives there any more.
"""
