"""What tpcheck leaves on disk: names, locks, JSON, result directories."""
