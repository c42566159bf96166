"""Long work: progress, cancellation, results."""
