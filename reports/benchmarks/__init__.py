"""Scripts whose figures the project quotes; they drive the command line and write reports/results."""
