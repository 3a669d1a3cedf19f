"""What a user calls on the command line: one module for each command, entered in fxfuse/cli.py."""
