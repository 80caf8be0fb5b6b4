"""What another package adds to enginewright."""
