"""What a guest must prove to get a key."""
