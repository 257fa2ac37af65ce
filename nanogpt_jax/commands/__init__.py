"""What a person types: `nanogpt-jax COMMAND`. A command may import every room, but no other command."""
