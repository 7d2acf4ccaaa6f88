"""What a model is for: `task.kind` names the file, which has `Settings`, `build`, `parts` and `least`."""
