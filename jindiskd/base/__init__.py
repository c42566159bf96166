"""What every part needs: secrets, processes, durable files, logging."""
