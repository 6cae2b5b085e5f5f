"""What of its host is a server's alone: CPUs, pages, devices."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "before_0003_seats", "before_0002_global_request_ids"


def upgrade() -> None:
    op.create_table(
        "seats",
        sa.Column("consumer", sa.String(length=36), nullable=False),
        sa.Column("provider", sa.String(length=36), nullable=False),
        sa.Column("seat", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["consumer"], ["consumers.uuid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("consumer"),
    )
    with op.batch_alter_table("seats", schema=None) as batch_op:
        batch_op.create_index("seats_of_provider", ["provider"], unique=False)
