def findings(r): return []
