"""The steps of the schema, one a file, in the order of their numbers: docs/how/a-column.md."""
