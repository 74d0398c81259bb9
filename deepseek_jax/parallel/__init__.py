"""What moves between devices, and nothing else."""
