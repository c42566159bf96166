"""What stands behind the bus: image store, key store and domains, in the form that `bus.ports` describes."""
