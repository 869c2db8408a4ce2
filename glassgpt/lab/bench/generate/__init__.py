"""`glassgpt bench generate`: generation beside other engines. Imports nothing: every worker process comes through here."""
