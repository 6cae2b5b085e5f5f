"""Notifications by their topics: one that nobody reads is in no other's way."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "before_0007_notices_by_topic", "before_0006_host_identity"


def upgrade() -> None:
    with op.batch_alter_table("notices") as batch_op:
        batch_op.add_column(sa.Column("topic", sa.String(length=255), server_default="", nullable=False))
        batch_op.create_index("notices_of_topic", ["topic", "id"], unique=False)
