"""Stand-ins that can be told to fail; each passes the same contract tests as the real thing."""
