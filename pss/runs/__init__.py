"""What a run leaves on the disk: checkpoints, log rows, and the lock that keeps two runs out of one folder. Training
writes these files; inference and other runs read them.
"""
