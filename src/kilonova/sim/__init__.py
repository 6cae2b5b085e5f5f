"""A whole cloud in one thread, on virtual time, with everything going wrong that a seed can think of."""
