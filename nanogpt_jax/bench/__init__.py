"""How fast this machine trains and generates, optionally beside PyTorch. To remove it, `rm -r` this room."""
