"""Files, checkpoints and logs that survive interruptions and detect corruption."""
