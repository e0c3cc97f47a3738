"""The index's inside: its tables, how files are folded into them, what ad-hoc SQL may do."""
