"""The objects on D-Bus."""
