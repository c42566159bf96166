"""The simulated platform: firmware and roots in the real formats."""
