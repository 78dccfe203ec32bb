"""The configuration of one run: its keys (`schema`), how a run file is read (`load`), what cannot work (`check`)."""
