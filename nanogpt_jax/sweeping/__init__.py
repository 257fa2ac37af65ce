"""Many runs at once: a grid of settings times seeds, compared honestly."""
