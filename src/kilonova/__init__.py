"""Kilonova: an OpenStack Compute cloud. `docs/how/` says where things are; `main.py` is the door."""

__version__ = "0.1.0"
