"""What a real Placement service is owed."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "before_0005_placement_is_told", "before_0004_servers_have_shares"


def upgrade() -> None:
    op.create_table(
        "placement_dues",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "id"),
    )
