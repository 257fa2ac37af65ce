"""What a run would need and cost, here or on hardware that is not here, before it starts."""
