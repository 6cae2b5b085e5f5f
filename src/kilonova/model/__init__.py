"""The nouns of a cloud: pure, no I/O, no clock."""
