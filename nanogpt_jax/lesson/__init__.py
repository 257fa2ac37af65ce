"""The lesson: attention by hand, then in a trained model. To remove it, `rm -r` this room."""
