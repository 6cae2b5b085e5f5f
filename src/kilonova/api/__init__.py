"""The Compute API. A file is a group of routes of `registry.R`; `app.py` makes a service of them."""
