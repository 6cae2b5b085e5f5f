"""What runs on each host. It has no database, and nothing here may ask for one."""
