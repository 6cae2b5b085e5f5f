"""Which machine a host is: another that takes its name is told so."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "before_0006_host_identity", "before_0005_placement_is_told"


def upgrade() -> None:
    with op.batch_alter_table("services") as batch_op:
        batch_op.add_column(sa.Column("identity", sa.String(length=36), server_default="", nullable=False))
