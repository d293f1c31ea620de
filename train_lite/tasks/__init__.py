"""What differs between tasks: data, batches, objective, scores, pictures."""
