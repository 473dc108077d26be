"""What the playground's page asks for."""
