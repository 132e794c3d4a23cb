"""An adapter into its base: several as one, layers packed again, and what is kept. Knows networks and folders."""
