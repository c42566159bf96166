"""The key-broker protocol, shared by guest and broker; small imports."""
