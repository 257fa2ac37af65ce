"""What any room may use of the machine: whole files (`files`), the terminal (`terminal`). No jax here."""
