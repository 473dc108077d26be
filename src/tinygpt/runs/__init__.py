"""What stays: a run and its folder."""
