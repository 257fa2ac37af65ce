"""What any room may use of the machine: whole files (`files`), the terminal (`terminal`), words for
messages (`messages`). No jax here."""
