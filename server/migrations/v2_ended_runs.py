"""Ended runs are told of without their hubs: rounds and clients stand with the run. The schema's version is
Alembic's alone.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision, down_revision = "2", "1"


def upgrade() -> None:
    """Add two columns, drop one."""
    with op.batch_alter_table("leadership") as table:
        table.drop_column("schema_version")
    for name in ("rounds", "clients"):
        op.add_column("runs", sa.Column(name, sa.Integer, nullable=False, server_default="0"))
