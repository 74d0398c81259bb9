"""Matrix products at the precision of the run."""
