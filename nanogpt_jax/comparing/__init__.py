"""Many runs beside each other: what differs, what that is worth over seeds, and how sure that is."""
