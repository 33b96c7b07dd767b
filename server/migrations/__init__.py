"""The event log's schema, one module a revision, each a step from the one before; run by Alembic.

A revision is never changed once it was released. :mod:`hansa.server.database` names the newest and climbs to
it; a test holds the outcome against the tables of :mod:`hansa.server.events`.
"""
