"""Front ends: they read options and print results, nothing else."""
