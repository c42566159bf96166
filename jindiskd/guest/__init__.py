"""The agent in the guest's initrd: standard library, cryptography, and the few packages it names."""
