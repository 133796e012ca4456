"""How things are timed, shown to be right, and recorded."""
