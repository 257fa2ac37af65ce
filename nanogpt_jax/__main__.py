import sys

from nanogpt_jax.cli import main

sys.exit(main())
