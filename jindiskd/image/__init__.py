"""The image store and the builder."""
