"""The application behind the command `gdn`: data, mesh, step, loop, checkpoint, sweep and report."""
