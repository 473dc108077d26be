"""Files: written whole or not at all, fetched and verified, and where they may lie."""
