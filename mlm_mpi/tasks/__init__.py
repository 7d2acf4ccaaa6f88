"""What a trained model is for: data, head and metrics of a task."""
