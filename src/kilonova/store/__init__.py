"""SQL: a file is its tables and what is asked of them. The transaction comes first."""
