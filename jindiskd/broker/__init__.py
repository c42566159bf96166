"""Sessions and release: the key-broker service and the relay."""
