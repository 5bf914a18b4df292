"""API keys: whose they are, what each may do, and how much it has used."""
