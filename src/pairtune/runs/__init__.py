"""What a run leaves behind and comes back from: its folder, checkpoints, log lines, live display and process group."""
