"""How good a model is, measured the same way each time."""
