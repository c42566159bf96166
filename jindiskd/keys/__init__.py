"""The key store and the audit log."""
