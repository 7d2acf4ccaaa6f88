"""Sub-commands: arguments in, one call, exit code out. The only room that sees runs and tasks both."""
