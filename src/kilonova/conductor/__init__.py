"""Runs, and what nobody asked for: whatever takes longer than a request is carried here."""
