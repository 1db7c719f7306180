"""The acts: train, sweep, figures. Every module here is a command, `python -m experiments.<name>`."""
