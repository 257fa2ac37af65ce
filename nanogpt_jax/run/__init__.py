"""The run directory: whose it is, what stands in it, and how it is opened."""
