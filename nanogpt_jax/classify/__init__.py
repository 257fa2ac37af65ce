"""Text classifiers: GPT-2 with a head over the last token. To remove it, `rm -r` this room and its command."""
