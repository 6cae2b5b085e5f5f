"""The idioms the house is built from. Knows nothing of clouds."""
