"""What crosses the bus. Messages may only grow; the shapes of the last release lie in `frozen/`."""
