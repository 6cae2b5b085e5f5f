"""Hypervisors, behind one small protocol: see `driver.py`."""
