"""What is typed: the commands, and how the machine is made ready for them."""
