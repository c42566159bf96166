"""LUKS2 volumes: make a header, check one that a hostile host supplies, encrypt the data behind it."""
