"""What a host, an image and a domain need, what is there, and what to do about each difference."""
