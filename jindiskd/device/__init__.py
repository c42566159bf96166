"""Block devices of this host that carry volumes of ours: what is there, whose image it is, opening and closing it."""
