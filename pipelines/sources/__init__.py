"""What pss-convert can read. `listing` asks every reader what it would make of a source; samples are byte
ranges with a name and a label.
"""
