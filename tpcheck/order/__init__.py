"""In which order a sum is added, found out from its results (FPRev)."""
