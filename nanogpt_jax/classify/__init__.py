"""Text classifiers: GPT-2 with a head over the last token. `rm -r` this room and its command: nothing misses it."""
