"""The edge agent.

::

    agent      from a job's offer to its acknowledgement, whatever connections do
    session    one connection                         workshop   where jobs are trained
    outbox     what is kept on disk                   policy     what the owner allows
    check      what could go wrong, before joining    watch      what a job may take
    enrolment  certificates

The agent runs the client half of the same :class:`hansa.core.algorithm.Algorithm` objects that the simulator
runs, in the same loop (:mod:`hansa.strategies.local`).
"""
