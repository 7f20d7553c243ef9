"""Studies and benchmarks of rollflow."""
