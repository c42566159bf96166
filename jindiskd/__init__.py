"""Trusted startup of encrypted virtual machine images."""

__version__ = "0.1.0"
