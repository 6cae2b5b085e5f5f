"""Runs know the global request id that their cause bore: what one request led to is found in every role's log."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "before_0002_global_request_ids", "before_0001_first"


def upgrade() -> None:
    with op.batch_alter_table("runs") as batch_op:
        batch_op.add_column(sa.Column("global_request_id", sa.String(length=64), nullable=True))
