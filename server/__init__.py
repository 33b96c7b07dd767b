"""The coordinator of a real federation.

::

    app        a process: configuration, start, drain, end
    agents     the service that agents call              control     the service that people call
    limits     what one may ask, and all together        leases      who may work on a job
    office     who is there and what runs                roster      agents, for people to see
    runs       a live run: its task, clock, workers      past        one that has ended
    inbox      what happens to it, in one order          jobs        those that are out
    machine    a run as a fold over its events           evaluation  by clients
    events     the log: commits, epochs, snapshots       database    SQLite or PostgreSQL
    artefacts  updates and snapshots on disk             patience    what is tried again
    reception  an upload under way                       pieces      its messages
    pages      memory and files for updates              verify      a finished run, audited
    trust/     certificates, roles, audit log            figures     what is counted
    crash      points for tests

An update passes :mod:`~hansa.server.agents` (every check), :mod:`~hansa.server.artefacts` (its bytes),
:mod:`~hansa.server.events` (its row), and only then :mod:`~hansa.server.machine`, which drives the same
:class:`hansa.core.hub.Hub` that the simulator drives.
"""
