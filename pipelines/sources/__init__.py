"""What pss-convert can read. `listing` recognises a source; each other module lists one kind of it as samples: byte
ranges with a name and a label.
"""
