"""The JinDisk volume formats and their engine; usable without the rest."""
