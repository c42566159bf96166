"""Evidence formats, verifiers, expected measurements, certificates."""
