"""Trained models: opened, evaluated at every operating point, timed, drawn, and written for other programs. `opening`
reads whatever a user names, `sweep` makes the table, and the rest works from that.
"""
