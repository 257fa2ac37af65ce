"""How fast this machine trains and generates, beside PyTorch if asked. `rm -r` this room: nothing misses it."""
