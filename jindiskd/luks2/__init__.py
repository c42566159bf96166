"""LUKS2 headers: make, check, populate."""
