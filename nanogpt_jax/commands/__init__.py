"""What a person types: `nanogpt-jax COMMAND`. A command imports what it likes, except another command."""
