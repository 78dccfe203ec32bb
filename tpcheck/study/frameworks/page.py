def page(s,r): raise SystemExit
