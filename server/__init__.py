"""The coordinator of a real federation.

::

    app        a process: configuration, start, drain, end
    agents     the service that agents call          control    the service that people call
    office     who is there and what runs            runs       one live run: its task, clock, log, workers
    machine    a run as a fold over its events       events     the log: group commit, epochs, snapshots
    artefacts  updates and snapshots on disk         reception  an upload under way
    pages      memory and files for updates          verify     a finished run, audited
    trust/     certificates, roles, audit log        figures, crash

An update passes :mod:`~hansa.server.agents` (every check), :mod:`~hansa.server.artefacts` (its bytes),
:mod:`~hansa.server.events` (its row), and only then :mod:`~hansa.server.machine`, which drives the same
:class:`hansa.core.hub.Hub` that the simulator drives.
"""
