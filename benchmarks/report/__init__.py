"""Records -> tables and pictures; measures nothing."""
