"""What the dashboard's page asks for: curves, samples and events of runs."""
