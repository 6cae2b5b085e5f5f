"""What guests are told of themselves: at 169.254.169.254 and on the config drive, one tree."""
