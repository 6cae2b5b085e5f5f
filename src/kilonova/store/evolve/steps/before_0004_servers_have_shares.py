"""Shared file systems: those of our own service, with their rules and locks, and what servers have of them."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "before_0004_servers_have_shares", "before_0003_seats"


def upgrade() -> None:
    op.create_table(
        "filesystem_locks",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("resource", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("context", sa.String(length=8), nullable=False),
        sa.Column("reason", sa.String(length=1023), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("filesystem_locks", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_filesystem_locks_project_id"), ["project_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_filesystem_locks_resource"), ["resource"], unique=False)

    op.create_table(
        "filesystem_rules",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("share_id", sa.String(length=36), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("who", sa.String(length=255), nullable=False),
        sa.Column("level", sa.String(length=2), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("share_id", "kind", "who"),
    )
    op.create_table(
        "filesystems",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("size_gb", sa.Integer(), nullable=False),
        sa.Column("proto", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("description", sa.String(length=255), nullable=True),
        sa.Column("is_public", sa.Boolean(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("filesystems", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_filesystems_project_id"), ["project_id"], unique=False)

    op.create_table(
        "server_shares",
        sa.Column("uuid", sa.String(length=36), nullable=False),
        sa.Column("server", sa.String(length=36), nullable=False),
        sa.Column("share_id", sa.String(length=36), nullable=False),
        sa.Column("tag", sa.String(length=255), nullable=False),
        sa.Column("export", sa.String(length=1024), nullable=False),
        sa.Column("proto", sa.String(length=16), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("who", sa.String(length=255), nullable=False),
        sa.Column("busy", sa.String(length=16), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("uuid"),
        sa.UniqueConstraint("server", "share_id"),
        sa.UniqueConstraint("server", "tag"),
    )
    with op.batch_alter_table("server_shares", schema=None) as batch_op:
        batch_op.create_index("server_shares_of_share", ["share_id"], unique=False)
