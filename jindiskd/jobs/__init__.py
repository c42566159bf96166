"""Long work: what runs, how far it is, how it ended, and how to stop it."""
